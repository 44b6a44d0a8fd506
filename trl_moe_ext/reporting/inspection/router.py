"""What kind of router chooses the experts of a block: told by its attributes and its code, or not told at all."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import nn

UNKNOWN = "unknown"

_SCORES = ("softmax", "sigmoid")
_SCORING_NAME = re.compile(r"scor(e|ing)_func(tion)?|expert_selection_fn")
_CORRECTION_NAME = re.compile(r"correction_bias$|expert_bias$|balancing_biases$")


@dataclass(frozen=True)
class RouterKind:
    """The router of a block.

    Attributes:
        class_name: of its module.
        scoring: ``softmax``, ``sigmoid``, another function that the config names, or ``unknown``.
        has_correction_bias: a bias, which no gradient reaches, is added to the scores to balance the experts.
    """

    class_name: str
    scoring: str
    has_correction_bias: bool


def router_kind(router: nn.Module, block: nn.Module, config: object) -> RouterKind:
    """The kind of `router`.

    Args:
        router: the module with a row for each expert.
        block: the module that holds the router and the experts.
        config: of the model around the block.
    """
    tensors = [*block.named_parameters(), *block.named_buffers()]
    has_correction_bias = any(_CORRECTION_NAME.search(name) for name, _ in tensors)
    return RouterKind(type(router).__name__, _scoring(router, block, config), has_correction_bias)


def _scoring(router: nn.Module, block: nn.Module, config: object) -> str:
    """The function that turns logits into scores: by the code, then by an option, which the code may not heed."""
    router_class: type = type(router)
    block_class: type = type(block)
    in_code = _called(router_class)
    if len(in_code) == 1:
        return min(in_code)
    for owner in (router, config):
        option = _option(owner)
        if option is not None:
            return option
    # The block's own code is asked last: it may hold another sigmoid, such as that of a shared expert's gate.
    in_block = in_code or _called(block_class)
    return min(in_block) if len(in_block) == 1 else UNKNOWN


def _option(owner: object) -> str | None:
    values: dict[str, Any] = vars(owner)
    return next((v for n, v in values.items() if _SCORING_NAME.fullmatch(n) and isinstance(v, str)), None)


@functools.cache
def _called(cls: type) -> frozenset[str]:
    """Which of the scoring functions are called in the code of a class."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return frozenset()  # a class without a source file, or a built-in
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls}
    return frozenset(names & set(_SCORES))
