"""How many experts a token is sent to: told by modules, or by the words that configs have for it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_OPTION = re.compile(r"num_experts_per_tok(en)?|num_selected_experts|moe_top_?k|moe_k|top_?k_experts")
# A number that is part of the algorithm, as in Top2Router, and therefore no option.
_CLASS = re.compile(r"Top(\d+)Router")


def experts_per_token(modules: Iterable[nn.Module], config: object) -> int | None:
    """K, or None if neither the modules nor the config say.

    Args:
        modules: the router, if there is one, and then the block around it.
        config: of the model around them; None if there is none.
    """
    known = list(modules)
    for module in known:
        if isinstance(found := getattr(module, "top_k", None), int):
            return found
    for module in known:
        if by_name := _CLASS.search(type(module).__name__):
            return int(by_name[1])
    options = vars(config) if config is not None else {}
    return next((v for name, v in options.items() if _OPTION.fullmatch(name) and isinstance(v, int)), None)
