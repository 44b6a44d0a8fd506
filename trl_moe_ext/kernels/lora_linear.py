"""A grouped linear map with a low-rank update, forward and backward, that never forms the merged weight.

With rows x of expert e, frozen weight W_e, factors A_e and B_e, scaling s and dropout m:

    y  = W_e x + B_e u              u  = s A_e (m.x)
    dx = W_e^T g + m.(A_e^T v)      v  = s B_e^T g
    dB = g u^T                      dA = v (m.x)^T

The frozen branch never sees dropout, and the gradient of W_e is computed only if somebody asked to train it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.grouped import grouped_mm, grouped_outer
from trl_moe_ext.kernels.grouped_update import GroupedUpdate
from trl_moe_ext.kernels.low_rank import LowRank, Updates, sets_apart


def lora_linear(x: Tensor, weight: Tensor, updates: Updates, dispatch: Dispatch, *, gather: bool = False) -> Tensor:
    """Apply each expert's weight and low-rank updates to its rows.

    Args:
        x: ``(S, in)`` rows sorted by expert, or with `gather` the ``(T, in)`` tokens themselves: then no K-fold copy
            of them is kept for the backward pass.
        weight: ``(E, in, out)``, any strides.
        updates: the active adapters' factors; may be empty.
        dispatch: the routing.

    Returns:
        ``(S, out)`` in the dtype of `weight`; rows of no expert are zero.
    """
    x = x.to(weight.dtype)
    first, *others = sets_apart(updates)
    y = _apply(x, weight, first, dispatch, gather)
    for apart in others:
        y = y + _apply(x, None, apart, dispatch, gather)
    return y


def _apply(x: Tensor, weight: Tensor | None, updates: Updates, dispatch: Dispatch, gather: bool) -> Tensor:
    leaves = [factor for update in updates for factor in (update.A, update.B)]
    y: Tensor = _LoraLinear.apply(x, weight, updates, dispatch, gather, *leaves)  # type: ignore[no-untyped-call]
    return y


class _LoraLinear(torch.autograd.Function):
    """One map, with updates of which an expert has at most one; without a weight, the updates alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        updates: Updates,
        dispatch: Dispatch,
        gather: bool,
        *leaves: Tensor,
    ) -> Tensor:
        u = None
        with _full_precision(x):
            rows = dispatch.gather(x) if gather else x
            if weight is not None:
                y = grouped_mm(rows, weight, dispatch.offsets)
            else:
                y = rows.new_zeros(len(dispatch.order), updates[0].B.shape[1])
            if updates:
                update = GroupedUpdate(updates, dispatch, rows, zero_tail=True)
                u = update.u(rows)
                update.add_y(y, u)
        # Shapes and number of the saved tensors do not depend on the routing: non-reentrant checkpointing compares
        # them, and a recompute may route otherwise.
        ctx.save_for_backward(x, weight, u, *dispatch[:3], *leaves)
        ctx.top_k, ctx.gather, ctx.options = dispatch.top_k, gather, [update[2:] for update in updates]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, u, order, position, offsets, *leaves = ctx.saved_tensors
        dispatch = Dispatch(order, position, offsets, ctx.top_k)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        needs_leaves = ctx.needs_input_grad[5:]
        pairs = zip(leaves[::2], leaves[1::2], ctx.options, strict=True)
        updates = tuple(LowRank(A, B, *options) for A, B, options in pairs)
        grad = grad.contiguous()
        dx = dweight = None
        d_leaves: list[Tensor | None] = [None] * len(leaves)
        with _full_precision(x):
            rows = dispatch.gather(x) if ctx.gather and (needs_weight or any(needs_leaves)) else x
            if needs_x:
                dx = _through(weight, grad, x, offsets)
            if updates:
                update = GroupedUpdate(updates, dispatch, x, zero_tail=True)
                v = update.v(grad)
                if any(needs_leaves[::2]):
                    d_leaves[::2] = update.dA(v, rows)
                if any(needs_leaves[1::2]):
                    d_leaves[1::2] = update.dB(grad, u)
                if dx is not None:
                    update.add_dx(dx, v)
            if needs_weight:
                dweight = grouped_outer(rows, grad, offsets)
            if dx is not None and ctx.gather:
                dx = dispatch.to_slots(dx).sum(dim=1)
        return dx, dweight, None, None, None, *d_leaves


def _through(weight: Tensor | None, grad: Tensor, like: Tensor, offsets: Tensor) -> Tensor:
    """``(S, in)``: the gradient of the rows by way of the weight."""
    if weight is None:
        return like.new_zeros(len(grad), like.shape[1])
    return grouped_mm(grad, weight.transpose(1, 2), offsets)


def _full_precision(x: Tensor) -> torch.autocast:
    """Experts run in the dtype of their frozen weights, under autocast too, as in transformers' grouped_mm."""
    return torch.autocast(x.device.type, enabled=False)
