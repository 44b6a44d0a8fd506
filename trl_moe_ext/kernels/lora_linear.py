"""A grouped linear map with a low-rank update, forward and backward, that never forms the merged weight.

With rows x of expert e, frozen weight W_e, factors A_e and B_e, scaling s and dropout m:

    y  = W_e x + B_e u              u  = s A_e (m.x)
    dx = W_e^T g + m.(A_e^T v)      v  = s B_e^T g
    dB = g u^T                      dA = v (m.x)^T

The frozen branch never sees dropout, and the gradient of W_e is computed only if somebody asked to train it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.dropout import drop
from trl_moe_ext.kernels.grouped import aligned_rank, grouped_mm, grouped_outer


class LowRank(NamedTuple):
    """One adapter's update ``scaling * B @ A`` of one stack of expert weights.

    Attributes:
        A: ``(E, r, in)``, any floating dtype; products run in the dtype of the rows, gradients come back in this one.
        B: ``(E, out, r)``.
        scaling: s.
        dropout: probability p of dropping an input feature of the low-rank branch.
        seed: 0-d int32 from `dropout.draw_seed`; None switches dropout off.
        first_pair: number of the first (token, slot) pair, where a call has a part of the tokens: masks go on.
    """

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None
    first_pair: int = 0

    def dropped(self, x: Tensor, pairs: Tensor) -> Tensor:
        """``(n, in)`` rows of the (token, slot) pairs ``(n,)``: what dropout leaves of them."""
        return x if self.seed is None else drop(x, self.seed, pairs + self.first_pair, self.dropout)


def lora_linear(
    x: Tensor, weight: Tensor, updates: tuple[LowRank, ...], dispatch: Dispatch, *, gather: bool = False
) -> Tensor:
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
    first = updates[0] if updates else None
    y: Tensor = _LoraLinear.apply(x, weight, *_operands(first), *dispatch, gather)  # type: ignore[no-untyped-call]
    for update in updates[1:]:
        y = y + _LoraLinear.apply(x, None, *_operands(update), *dispatch, gather)  # type: ignore[no-untyped-call]
    return y


def _operands(update: LowRank | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, float]:
    if update is None:
        return None, None, None, 0.0, 0.0
    return update.A, update.B, update.seed, update.scaling, update.dropout if update.seed is not None else 0.0


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        seed: Tensor | None,
        scaling: float,
        dropout: float,
        order: Tensor,
        position: Tensor,
        offsets: Tensor,
        top_k: int,
        gather: bool,
    ) -> Tensor:
        dispatch = Dispatch(order, position, offsets, top_k)
        with _full_precision(x):
            rows = dispatch.gather(x) if gather else x
            y = grouped_mm(rows, weight, offsets) if weight is not None else None
            u = None
            if A is not None and B is not None:
                a, b = _factors(A, B, rows)
                masked = drop(rows, seed, order, dropout) if seed is not None else rows
                u = grouped_mm(masked, a.transpose(1, 2), offsets).mul_(scaling)
                low_rank = grouped_mm(u, b.transpose(1, 2), offsets)
                y = low_rank if y is None else y.add_(low_rank)
        # Shapes and number of the saved tensors do not depend on the routing: non-reentrant checkpointing compares
        # them, and a recompute may route otherwise.
        ctx.save_for_backward(x, weight, A, B, u, seed, order, position, offsets)
        ctx.scaling, ctx.dropout, ctx.top_k, ctx.gather = scaling, dropout, top_k, gather
        assert y is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B, u, seed, order, position, offsets = ctx.saved_tensors
        dispatch = Dispatch(order, position, offsets, ctx.top_k)
        needs_x, needs_weight, needs_A, needs_B = ctx.needs_input_grad[:4]
        grad = grad.contiguous()
        dx = dweight = dA = dB = None
        with _full_precision(x):
            if needs_x and weight is not None:
                dx = grouped_mm(grad, weight.transpose(1, 2), offsets)
            rows = dispatch.gather(x) if ctx.gather and (needs_A or needs_weight) else x
            if A is not None and B is not None:
                a, b = _factors(A, B, x)
                v = grouped_mm(grad, b, offsets).mul_(ctx.scaling)
                if needs_B:
                    dB = grouped_outer(grad, u, offsets)[..., : B.shape[2]].to(B.dtype)
                if needs_A:
                    masked = drop(rows, seed, order, ctx.dropout) if seed is not None else rows
                    dA = grouped_outer(v, masked, offsets)[:, : A.shape[1]].to(A.dtype)
                if needs_x:
                    low_rank = grouped_mm(v, a, offsets)
                    low_rank = drop(low_rank, seed, order, ctx.dropout) if seed is not None else low_rank
                    dx = low_rank if dx is None else dx.add_(low_rank)
            if needs_weight:
                dweight = grouped_outer(rows, grad, offsets)
            if dx is not None and ctx.gather:
                dx = dispatch.to_slots(dx).sum(dim=1)
        return dx, dweight, dA, dB, *([None] * 8)


def _factors(A: Tensor, B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors in the dtype of `like`, with the rank padded by zeros where the device needs it."""
    missing = aligned_rank(A.shape[1], like) - A.shape[1]
    a, b = A.to(like.dtype), B.to(like.dtype)
    return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))) if missing else (a, b)


def _full_precision(x: Tensor) -> torch.autocast:
    """Experts run in the dtype of their frozen weights, under autocast too, as in transformers' grouped_mm."""
    return torch.autocast(x.device.type, enabled=False)
