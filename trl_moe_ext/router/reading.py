"""Read a routing out of what a router returns: logits, chosen experts and their weights, in whatever form.

Nothing is guessed: a correction bias, groups or noise may stand between logits and choice, so the choice is never made
again from the logits. The forms in the field:

- chosen experts ``(T, K)`` and their weights, in any order (most families);
- weights of all experts ``(T, E)``, zero for those that were not chosen (Llama 4, NLLB-MoE);
- a mask ``(T, E)`` of zeros and ones, and the weights of the chosen (Switch Transformers);
- rows sorted by expert, and how many each has (JetMoe);
- two sets of keys whose sums are the logits (Doge): the largest are chosen by definition, the one exception;
- logits alone: then the experts are called with the choice (DBRX), which `read_call` reads.

Legend: T tokens, K top_k, E experts of the router.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.router.routers import ADVICE, Router


class Choice(NamedTuple):
    """``(T, K)`` int64 chosen experts, and ``(T, K)`` weights where the router tells them."""

    top_k_index: Tensor
    top_k_weights: Tensor | None


def read_output(output: Any, router: Router) -> tuple[Tensor, Choice | None]:
    """Logits ``(T, E)`` and choice of one forward of a router; None if its output does not hold the choice.

    Tokens that a full expert turned away have the expert that the router chose, with weight zero.

    Raises:
        LayoutError: the logits cannot be told, or have another width than E.
    """
    parts = list(output) if isinstance(output, tuple | list) else [output]
    position = position_of_logits(parts, router)
    raw = parts.pop(position)
    if raw.ndim == 3 and raw.shape[0] == 2 and raw.shape[-1] ** 2 == router.num_experts:
        logits = (raw[0].unsqueeze(2) + raw[1].unsqueeze(1)).flatten(1)
        return logits, Choice(logits.topk(router.top_k).indices, None)
    if raw.shape[-1] != router.num_experts:
        raise LayoutError(
            f"the logits of {router.name!r} should be of {router.num_experts} experts; found {tuple(raw.shape)}. "
            f"{ADVICE}"
        )
    logits = raw.reshape(-1, router.num_experts)
    choice = _pair(parts, len(logits), router.top_k) or _dense(parts, logits, router.top_k)
    choice = choice or _mask(parts, logits, router.top_k) or _sorted_rows(parts, router)
    return logits, _with_skips(choice, router)


def read_call(arguments: Iterable[Any], num_tokens: int, router: Router) -> Choice | None:
    """The choice in the arguments that the experts are called with, or None if it is not there.

    Args:
        arguments: positional ones and then those by keyword, which families call by different names. The first are
            the tokens.
        num_tokens: T.
        router: whose choice it is.
    """
    return _with_skips(_pair(list(arguments)[1:], num_tokens, router.top_k), router)


def position_of_logits(parts: list[Any], router: Router) -> int:
    if router.logits_at is not None:
        return router.logits_at if len(parts) > 1 else 0
    wide = [i for i, part in enumerate(parts) if is_float(part) and part.shape[-1] == router.num_experts]
    if len(wide) != 1:
        shapes = [tuple(part.shape) for part in parts if isinstance(part, Tensor)]
        raise LayoutError(
            f"the output of {router.name!r} should hold one tensor with a logit for each of {router.num_experts} "
            f"experts; found the shapes {shapes}. {ADVICE}"
        )
    return wide[0]


def _pair(parts: list[Any], T: int, K: int) -> Choice | None:
    index = next((part for part in parts if is_integer(part) and is_of_shape(part, T, K)), None)
    if index is None:
        return None
    # The first: others of that shape, such as the weights of shared experts, stand behind it.
    weights = next((part for part in parts if is_float(part) and is_of_shape(part, T, K)), None)
    return Choice(index.reshape(T, K).long(), None if weights is None else weights.reshape(T, K))


def _dense(parts: list[Any], logits: Tensor, K: int) -> Choice | None:
    gates = next((part for part in parts if is_float(part) and is_of_shape(part, *logits.shape)), None)
    if gates is None:
        return None
    gates = gates.reshape(logits.shape)
    index = _chosen_first(gates > 0, logits, K)
    return Choice(index, gates.gather(1, index))


def _mask(parts: list[Any], logits: Tensor, K: int) -> Choice | None:
    mask = next((part for part in parts if is_integer(part) and is_of_shape(part, *logits.shape)), None)
    weights = next((part for part in parts if is_float(part) and is_of_shape(part, len(logits), K)), None)
    if mask is None or weights is None:
        return None
    mask = mask.reshape(logits.shape)
    index = _chosen_first(mask > 0, logits, K)
    return Choice(index, weights.reshape(index.shape) * mask.gather(1, index))


def _chosen_first(is_chosen: Tensor, logits: Tensor, K: int) -> Tensor:
    """The chosen experts, and then, where an expert turned the token away, those with the largest logits."""
    # A probability is at most one: no expert that was not chosen can overtake one that was.
    return (logits.detach().float().softmax(-1) + 2 * is_chosen).topk(K).indices


def _sorted_rows(parts: list[Any], router: Router) -> Choice | None:
    """Undo the sorting: ``sizes`` rows of each expert, the weight of each row, and where each came from."""
    sizes = next((part for part in parts if isinstance(part, list) and len(part) == router.num_experts), None)
    if sizes is None:
        return None
    rows = sum(sizes)
    flat = [part for part in parts if isinstance(part, Tensor) and part.shape == (rows,)]
    integers, weights = [part for part in flat if is_integer(part)], [part for part in flat if is_float(part)]
    if not rows or not integers or not weights:
        return None
    # Beside the position of a row stands its token, which is a smaller number.
    positions = max(integers, key=lambda part: int(part.max()))
    experts = torch.arange(router.num_experts, device=positions.device)
    sorted_experts = experts.repeat_interleave(torch.tensor(sizes, device=positions.device))
    back = positions.argsort()
    return Choice(sorted_experts[back].view(-1, router.top_k), weights[0][back].view(-1, router.top_k))


def _with_skips(choice: Choice | None, router: Router) -> Choice | None:
    """Tokens that skip the experts are sent to expert 0 with weight zero: name what was chosen instead."""
    if choice is None or choice.top_k_weights is None or router.skip_class is None:
        return choice
    index = torch.where(choice.top_k_weights == 0, router.skip_class, choice.top_k_index)
    return Choice(index, choice.top_k_weights)


def is_float(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def is_integer(part: Any) -> bool:
    return isinstance(part, Tensor) and not part.is_floating_point() and part.dtype != torch.bool


def is_of_shape(part: Tensor, rows: int, columns: int) -> bool:
    """Whether a tensor is ``(rows, columns)``, with the rows in one dimension or in two."""
    return part.ndim > 1 and part.shape[-1] == columns and part.numel() == rows * columns
