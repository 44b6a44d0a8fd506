"""Grouped products with frozen matrices and what is added to them, and the gradient of what is added.

On a CPU the sum of one expert at a time is formed in memory that stays in the caches, and a gradient is written where
autograd keeps it: at a few hundred tokens a pass over all matrices that are trained takes longer than their products.
Elsewhere grouped products take the sum of all.

Legend: E experts, G of them selected, n rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.buckets import rounded
from trl_moe_ext.kernels.grouped import grouped_mm, grouped_outer


def summed_mm(x: Tensor, weight: Tensor, delta: Tensor, experts: Tensor | None, ends: Tensor) -> Tensor:
    """Each expert's rows times the sum of its frozen matrix and its delta.

    Args:
        x: ``(n, in)`` rows sorted by expert, in the dtype of `weight`.
        weight: ``(E, in, out)``, any strides.
        delta: ``(G, in, out)``, any strides and floating dtype. It is added in the wider dtype of both, and the sum is
            rounded to that of `weight`.
        experts: ``(G,)`` int64, the experts that have a delta; None for all.
        ends: ``(G,)`` int32, the end of each one's rows.

    Returns:
        ``(n, out)``; rows from ``ends[-1]`` on are zero.
    """
    if x.device.type == "cpu":
        experts = torch.arange(len(weight)) if experts is None else experts
        out: Tensor = _summed_op(x, weight, delta, experts, ends)
        return out
    return grouped_mm(x, _sums(weight, delta, experts), ends)


def outer_like(inputs: Tensor, grad: Tensor, ends: Tensor, delta: Tensor) -> Tensor:
    """For each expert the product of its rows with each other, ``inputs_e^T grad_e``: the gradient of its delta.

    Args:
        inputs: ``(n, in)`` rows sorted by expert.
        grad: ``(n, out)`` likewise, in the same dtype.
        ends: ``(G,)`` int32, the end of each expert's rows.
        delta: ``(G, in, out)``, of which nothing but the form is read.

    Returns:
        ``(G, in, out)`` in the dtype of `delta`, and with its strides: autograd would copy a gradient of others. Zero
        for an expert without rows.
    """
    if grad.device.type == "cpu":
        out: Tensor = _outer_op(inputs, grad, ends, delta)
        return out
    if _is_transposed(delta):
        return grouped_outer(grad, inputs, ends).mT.to(delta.dtype)
    return grouped_outer(inputs, grad, ends).to(delta.dtype)


def _sums(weight: Tensor, delta: Tensor, experts: Tensor | None) -> Tensor:
    """``(G, in, out)``, in the dtype of `weight`."""
    if experts is not None:
        # In the order in which memory has it: what is copied and added is read in one go.
        is_transposed = _is_transposed(weight)
        weight = (weight.mT if is_transposed else weight).index_select(0, experts)
        weight = weight.mT if is_transposed else weight
    return (weight + delta).to(weight.dtype)


@torch.library.custom_op("trl_moe_ext::summed_rows", mutates_args=())
def _summed_op(x: Tensor, weight: Tensor, delta: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(len(x), weight.shape[2])
    # In the order in which memory has the frozen matrices.
    total = torch.empty_like(weight[0])
    dtype = torch.promote_types(weight.dtype, delta.dtype)
    wide = total if dtype == total.dtype else torch.empty_like(total, dtype=dtype)
    chosen = experts.tolist()
    for place, start, end in _with_rows(ends):
        # Three passes over one matrix: operators with operands of several dtypes make copies of them.
        torch.add(wide.copy_(weight[chosen[place]]), delta[place], out=wide)
        out[start:end] = torch.mm(_in_bucket(x[start:end]), total.copy_(wide))[: end - start]
    out[int(ends[-1]) :] = 0
    return out


@_summed_op.register_fake
def _(x: Tensor, weight: Tensor, delta: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("trl_moe_ext::outer_like", mutates_args=())
def _outer_op(inputs: Tensor, grad: Tensor, ends: Tensor, delta: Tensor) -> Tensor:
    out = torch.empty_like(delta)
    # In the order in which memory has the result.
    left, right, results = (grad, inputs, out.mT) if _is_transposed(delta) else (inputs, grad, out)
    product = left.new_empty(left.shape[1], right.shape[1])
    idle = {*range(len(ends))}
    for place, start, end in _with_rows(ends):
        torch.mm(_in_bucket(left[start:end]).t(), _in_bucket(right[start:end]), out=product)
        results[place] = product
        idle.remove(place)
    for place in idle:
        results[place] = 0
    return out


@_outer_op.register_fake
def _(inputs: Tensor, grad: Tensor, ends: Tensor, delta: Tensor) -> Tensor:
    return torch.empty_like(delta)


def _with_rows(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """The place of each expert that has rows, and where they start and end.

    Rows between those of two selected experts do not exist: what is left out stands at the end.
    """
    for place, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start < end:
            yield place, start, end


def _in_bucket(rows: Tensor) -> Tensor:
    """The rows, in bfloat16 with zeros up to a bucketed count: a copy that is small beside an expert's matrix."""
    if rows.dtype != torch.bfloat16:
        return rows
    return F.pad(rows, (0, 0, 0, rounded(len(rows)) - len(rows)))


def _is_transposed(stack: Tensor) -> bool:
    return stack.stride(1) == 1 and stack.stride(2) != 1
