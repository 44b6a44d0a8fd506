"""Put another choice of experts into what a router returns or its experts are called with: the way back of `reading`.

The choice takes the place of the one that `reading` finds there, in its position, its shape and its dtype. All else,
such as the logits, stays as it is.

Legend: T tokens, K top_k, E experts of the router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trl_moe_ext.router.reading import is_float, is_integer, is_of_shape, position_of_logits
from trl_moe_ext.router.routers import Router

__all__ = ["write_call", "write_output"]


def write_output(output: Any, router: Router, top_k_index: Tensor, top_k_weights: Tensor) -> Any | None:
    """What a router returned, with another choice in it, or None if it holds none that could be replaced.

    Args:
        output: of one forward of `router`, in which `reading.read_output` has found a choice; left as it is.
        router: whose output it is.
        top_k_index: ``(T, K)`` int64, the experts.
        top_k_weights: ``(T, K)``, their weights, with a graph.
    """
    parts = list(output) if isinstance(output, tuple | list) else [output]
    at_logits = position_of_logits(parts, router)
    if parts[at_logits].shape[-1] != router.num_experts:  # keys, of whose sums the largest are chosen
        return None
    others = parts[:at_logits] + parts[at_logits + 1 :]
    index, weights = _without_skips(router, top_k_index, top_k_weights)
    written = _pair(others, index, weights)
    written = written or _dense(others, index, weights, router.num_experts)
    written = written or _sorted_rows(others, index, weights, router.num_experts)
    if written is None:
        return None
    written.insert(at_logits, parts[at_logits])
    return written if isinstance(output, list) else tuple(written)


def write_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], router: Router, top_k_index: Tensor, top_k_weights: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments of a module of experts with another choice in them, or None if they hold none.

    Args:
        args: positional ones, or none.
        kwargs: those by keyword. The first of all are the tokens.
        router: whose choice it is.
        top_k_index: as for `write_output`.
        top_k_weights: as for `write_output`.
    """
    tokens, *others = [*args, *kwargs.values()]
    written = _pair(others, *_without_skips(router, top_k_index, top_k_weights))
    if written is None:
        return None
    values = [tokens, *written]
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


def _pair(parts: list[Any], index: Tensor, weights: Tensor) -> list[Any] | None:
    """Chosen experts ``(T, K)`` and their weights."""
    at_index = _first(parts, lambda part: is_integer(part) and is_of_shape(part, *index.shape))
    at_weights = _first(parts, lambda part: is_float(part) and is_of_shape(part, *index.shape))
    if at_index is None or at_weights is None:
        return None
    return _replaced(parts, {at_index: index, at_weights: weights})


def _dense(parts: list[Any], index: Tensor, weights: Tensor, E: int) -> list[Any] | None:
    """Weights of all experts ``(T, E)``, zero for those that are not chosen.

    Not with a mask ``(T, E)`` beside them: of the tokens that an expert had room for, which is more than a choice.
    """
    shape = (len(index), E)
    at_gates = _first(parts, lambda part: is_float(part) and is_of_shape(part, *shape))
    at_mask = _first(parts, lambda part: is_integer(part) and is_of_shape(part, *shape))
    if at_gates is None or at_mask is not None:
        return None
    return _replaced(parts, {at_gates: weights.new_zeros(shape).scatter(1, index, weights)})


def _sorted_rows(parts: list[Any], index: Tensor, weights: Tensor, E: int) -> list[Any] | None:
    """Rows sorted by expert: how many each expert has, the weight of each, its token and where it came from."""
    at_sizes = _first(parts, lambda part: isinstance(part, list) and len(part) == E)
    flat = [i for i, part in enumerate(parts) if isinstance(part, Tensor) and part.shape == (index.numel(),)]
    at_weights, at_integers = [i for i in flat if is_float(parts[i])], [i for i in flat if is_integer(parts[i])]
    if at_sizes is None or len(at_weights) != 1 or len(at_integers) != 2 or not index.numel():
        return None
    # The number of a row is larger than that of its token.
    at_token, at_row = sorted(at_integers, key=lambda i: int(parts[i].max()))
    order = index.flatten().argsort(stable=True)
    tokens = order // index.shape[1]
    parts = _replaced(parts, {at_row: order, at_token: tokens, at_weights[0]: weights.flatten()[order]})
    parts[at_sizes] = torch.bincount(index.flatten(), minlength=E).tolist()
    return parts


def _without_skips(router: Router, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens that skip the experts are sent to expert 0 with weight zero: `reading` knows them by that."""
    if router.skip_class is None:
        return index, weights
    skips = index == router.skip_class
    return torch.where(skips, 0, index), torch.where(skips, 0, weights)


def _first(parts: list[Any], fits: Callable[[Any], bool]) -> int | None:
    return next((position for position, part in enumerate(parts) if fits(part)), None)


def _replaced(parts: list[Any], written: Mapping[int, Tensor]) -> list[Any]:
    """Other tensors at some positions, in the dtype and the shape of those that are there."""
    found = list(parts)
    for position, tensor in written.items():
        found[position] = tensor.to(parts[position].dtype).view_as(parts[position])
    return found
