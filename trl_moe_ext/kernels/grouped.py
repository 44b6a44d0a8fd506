"""Grouped matrix products: one product for each expert over that expert's rows.

On CUDA both products are `torch.nn.functional.grouped_mm`. Everywhere else they are a loop over the experts behind a
custom operator, so that torch.compile sees one opaque call.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.buckets import rounded

_ALIGNMENT = 16  # bytes: what grouped_mm asks of every stride on CUDA


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor, *, zero_tail: bool = True) -> Tensor:
    """Each expert's rows times its matrix.

    Args:
        x: ``(S, in)`` rows sorted by expert.
        weight: ``(E, in, out)``, any strides.
        offsets: ``(E,)`` int32, the end of each expert's rows.
        zero_tail: whether rows from ``offsets[-1]`` on, of no expert, have to be zero. On a GPU that costs two passes
            over all rows; else they may hold anything there.

    Returns:
        ``(S, out)``.
    """
    if _native(x, weight):
        rows = F.grouped_mm(x, weight, offs=offsets)
        return _zero_tail(rows, offsets) if zero_tail else rows
    out: Tensor = _rows_op(x, weight, offsets)
    return out


def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """For each expert the product of its rows with each other, ``left_e^T right_e``: the gradient of a weight.

    Args:
        left: ``(S, m)`` rows sorted by expert.
        right: ``(S, n)`` likewise.
        offsets: ``(E,)`` int32.

    Returns:
        ``(E, m, n)``; zero for an expert without rows.
    """
    if _native(left, right):
        return F.grouped_mm(left.t(), right, offs=offsets)
    out: Tensor = _outer_op(left, right, offsets)
    return out


def aligned_rank(rank: int, like: Tensor) -> int:
    """The rank to pad factors to so that `grouped_mm` can run natively on the device of `like`."""
    step = _ALIGNMENT // like.element_size() if like.device.type == "cuda" else 1
    return -(-rank // step) * step


def _native(x: Tensor, other: Tensor) -> bool:
    """Whether torch's own grouped product takes these operands."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    strides = (*x.stride(), *other.stride())
    return all(stride == 1 or stride * x.element_size() % _ALIGNMENT == 0 for stride in strides)


def _zero_tail(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows of no expert hold uninitialised memory, and 0 * NaN is NaN: zero them, without reading `offsets`."""
    tail = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
    return rows.masked_fill_(tail.unsqueeze(-1), 0)


@torch.library.custom_op("trl_moe_ext::grouped_rows", mutates_args=())
def _rows_op(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[2])
    bounds = [0, *offsets.tolist()]
    for expert, (start, end) in enumerate(pairwise(bounds)):
        if start == end:
            continue
        window = _window(start, end, x)
        # In ascending order the excess rows of a window fall on later experts, which then overwrite them.
        if window.start == start:
            torch.mm(x[window], weight[expert], out=out[window])
        else:
            out[start:end] = torch.mm(x[window], weight[expert])[start - window.start : end - window.start]
    out[bounds[-1] :] = 0
    return out


@_rows_op.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("trl_moe_ext::grouped_outer", mutates_args=())
def _outer_op(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    out = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for expert, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        if start == end:
            continue
        window = _window(start, end, left)
        # A neighbour's rows must not be summed: the narrower operand, a copy, is zero on them.
        if left.shape[1] <= right.shape[1]:
            torch.mm(_isolate(left, window, start, end).t(), right[window], out=out[expert])
        else:
            torch.mm(left[window].t(), _isolate(right, window, start, end), out=out[expert])
    return out


@_outer_op.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


def _window(start: int, end: int, rows: Tensor) -> slice:
    """The rows ``start:end``, widened to a bucketed count where that saves oneDNN a compilation.

    The rows in excess are a neighbour's, and their results are overwritten or discarded.
    """
    if rows.dtype != torch.bfloat16 or rows.device.type != "cpu":
        return slice(start, end)
    wide = rounded(end - start)
    if wide > rows.shape[0]:
        return slice(start, end)
    start = min(start, rows.shape[0] - wide)
    return slice(start, start + wide)


def _isolate(rows: Tensor, window: slice, start: int, end: int) -> Tensor:
    if (window.start, window.stop) == (start, end):
        return rows[window]
    alone = torch.zeros_like(rows[window])
    alone[start - window.start : end - window.start] = rows[start:end]
    return alone
