"""The expert MLP forward and backward, one expert after the other: what runs on a CPU.

An expert's rows, its intermediate results and its gradients stay in the cache from one product to the next, and no
tensor has a row for each (token, slot) pair but the one that is kept for the backward pass.

Legend: T tokens, K top_k, S = T*K routed rows sorted by expert, E experts, H hidden, I intermediate, r rank; n rows of
one expert, m the same rounded up.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from trl_moe_ext.kernels.buckets import STEP, rounded
from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.dropout import drop
from trl_moe_ext.kernels.gates import Gate
from trl_moe_ext.kernels.lora_linear import LowRank


class Frozen(NamedTuple):
    """The frozen weights: up ``(E, H, 2I)`` or ``(E, H, I)``, down ``(E, I, H)``, biases, and the gate between."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    gate: Gate


class Kept(NamedTuple):
    """What the forward leaves for the backward pass, in the order of the rows; empty if nothing is kept.

    Attributes:
        h: ``(S + padding, 2I)`` or ``(S + padding, I)``, the output of the first projection.
        up, down: ``(S + padding, r)``, the rank-sized results of both projections.
    """

    h: Tensor
    up: Tensor
    down: Tensor


class _Factors:
    """The factors of one projection in the dtype of the rows, one pair of views an expert."""

    def __init__(self, factors: LowRank, dtype: torch.dtype) -> None:
        self.factors = factors
        self.A = (factors.A * factors.scaling).to(dtype).unbind(0)
        self.At = [a.t() for a in self.A]
        self.B = factors.B.to(dtype).unbind(0)
        self.Bt = [b.t() for b in self.B]

    def masked(self, x: Tensor, pairs: Tensor) -> Tensor:
        """The rows that dropout left."""
        if self.factors.seed is None:
            return x
        out = torch.zeros_like(x)
        out[: len(pairs)] = drop(x[: len(pairs)], self.factors.seed, pairs, self.factors.dropout)
        return out


class _Rows:
    """The rows of every expert that has some: index, first row, number n, and n rounded up.

    The rows in excess hold finite numbers of other experts; their results are dropped.
    """

    def __init__(self, dispatch: Dispatch, dtype: torch.dtype) -> None:
        self._dispatch = dispatch
        self._sizes = dispatch.offsets.diff(prepend=dispatch.offsets.new_zeros(1)).tolist()
        self.pairs = self._split(dispatch.order)
        self.tokens = self._split(dispatch.tokens)
        starts = [0, *accumulate(self._sizes)]
        is_rounded = dtype == torch.bfloat16
        self.experts = [(e, starts[e], n, rounded(n) if is_rounded else n) for e, n in enumerate(self._sizes) if n]
        self.widest = max((m for *_, m in self.experts), default=0)

    def weights(self, top_k_weights: Tensor) -> tuple[Tensor, ...]:
        """``(T, K)`` routing weights to one ``(n, 1)`` an expert."""
        return self._split(self._dispatch.rows(top_k_weights))

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return torch.split(rows[: sum(self._sizes)], self._sizes)


def forward(
    hidden: Tensor,
    weights: Tensor,
    frozen: Frozen,
    factors: tuple[LowRank | None, LowRank | None],
    dispatch: Dispatch,
    keep: bool,
) -> tuple[Tensor, Kept]:
    """The output ``(T, H)`` in float32 or wider, and what the backward pass needs.

    Args:
        hidden: ``(T, H)``.
        weights: ``(T, K)`` routing weights.
        factors: of the up and the down projection.
        keep: also the first projection's output, which is computed again otherwise.
    """
    rows = _Rows(dispatch, hidden.dtype)
    up_low, down_low = (None if f is None else _Factors(f, hidden.dtype) for f in factors)
    ups, downs, row_weights = frozen.up.unbind(0), frozen.down.unbind(0), rows.weights(weights)
    x = hidden.new_zeros(rows.widest, hidden.shape[1])
    total = len(dispatch.order) + STEP
    h_rows = hidden.new_empty(total if keep else rows.widest, frozen.up.shape[2])
    kept_up, kept_down = (
        hidden.new_empty(total if f is not None else 0, f.A.shape[1] if f is not None else 0) for f in factors
    )
    out = torch.zeros(hidden.shape, dtype=_accumulator(hidden))
    for e, start, n, m in rows.experts:
        token, pairs = rows.tokens[e], rows.pairs[e]
        xe = x[:m]
        torch.index_select(hidden, 0, token, out=xe[:n])
        # In ascending order the rows in excess fall on later experts', which overwrite them.
        h = h_rows[start : start + m] if keep else h_rows[:m]
        torch.mm(xe, ups[e], out=h)
        if up_low is not None:
            u = torch.mm(up_low.masked(xe, pairs), up_low.At[e], out=kept_up[start : start + m])
            h += torch.mm(u, up_low.Bt[e])
        if frozen.up_bias is not None:
            h += frozen.up_bias[e]
        a = frozen.gate.forward(h)
        y = torch.mm(a, downs[e])
        if down_low is not None:
            u = torch.mm(down_low.masked(a, pairs), down_low.At[e], out=kept_down[start : start + m])
            y += torch.mm(u, down_low.Bt[e])
        if frozen.down_bias is not None:
            y += frozen.down_bias[e]
        out.index_add_(0, token, y[:n] * row_weights[e].to(out.dtype))
    return out, Kept(h_rows if keep else h_rows.new_empty(0), kept_up, kept_down)


class Gradients(NamedTuple):
    """Of tokens (None if not needed), routing weights, and the factors A and B of both projections (or None)."""

    hidden: Tensor | None
    weights: Tensor
    up: tuple[Tensor, Tensor] | None
    down: tuple[Tensor, Tensor] | None


def backward(
    grad: Tensor,
    hidden: Tensor,
    weights: Tensor,
    kept: Kept,
    frozen: Frozen,
    factors: tuple[LowRank | None, LowRank | None],
    dispatch: Dispatch,
    needs_hidden: bool,
) -> Gradients:
    """Every gradient from that of the output.

    The routing weight's needs no output: with the gradient g of a token, ``<g, y> = <da, a>`` where da is the gradient
    of the activation before the weight, plus ``<g, bias>``.
    """
    rows = _Rows(dispatch, hidden.dtype)
    up_low, down_low = (None if f is None else _Factors(f, hidden.dtype) for f in factors)
    ups, downs = [w.t() for w in frozen.up.unbind(0)], [w.t() for w in frozen.down.unbind(0)]
    row_weights = rows.weights(weights.to(hidden.dtype))
    is_kept = kept.h.numel() > 0
    x, g = (hidden.new_zeros(rows.widest, hidden.shape[1]) for _ in range(2))
    h_rows = kept.h if is_kept else hidden.new_empty(rows.widest, frozen.up.shape[2])
    d_hidden = torch.zeros(hidden.shape, dtype=_accumulator(hidden)) if needs_hidden else None
    d_weights = torch.zeros(len(dispatch.order), dtype=_accumulator(hidden))
    d_up, d_down = (None if f is None else _Sums(f) for f in factors)
    for e, start, n, m in rows.experts:
        token, pairs, w = rows.tokens[e], rows.pairs[e], row_weights[e]
        ge, xe = g[:m], x[:m]
        torch.index_select(grad, 0, token, out=ge[:n])
        if up_low is not None or not is_kept:
            torch.index_select(hidden, 0, token, out=xe[:n])
        h = h_rows[start : start + m] if is_kept else h_rows[:m]
        if not is_kept:
            torch.mm(xe, frozen.up[e], out=h)
            if up_low is not None:
                h += torch.mm(kept.up[start : start + m], up_low.Bt[e])
            if frozen.up_bias is not None:
                h += frozen.up_bias[e]
        a = frozen.gate.forward(h)
        d_a = torch.mm(ge, downs[e])
        if down_low is not None and d_down is not None:
            v = torch.mm(ge, down_low.B[e])
            d_a += down_low.masked(torch.mm(v, down_low.A[e]), pairs)
            d_down.add(e, n, v, down_low.masked(a, pairs), ge, kept.down[start : start + m], w)
        d_w = (d_a[:n] * a[:n]).sum(dim=-1, dtype=d_weights.dtype)
        if frozen.down_bias is not None:
            d_w += (ge[:n] @ frozen.down_bias[e].to(ge.dtype)).to(d_w.dtype)
        d_weights[start : start + n] = d_w
        d_a[:n] *= w
        d_h = frozen.gate.backward(h, d_a)
        d_x = torch.mm(d_h, ups[e]) if d_hidden is not None else None
        if up_low is not None and d_up is not None:
            v = torch.mm(d_h, up_low.B[e])
            if d_x is not None:
                d_x += up_low.masked(torch.mm(v, up_low.A[e]), pairs)
            d_up.add(e, n, v, up_low.masked(xe, pairs), d_h, kept.up[start : start + m], None)
        if d_hidden is not None and d_x is not None:
            d_hidden.index_add_(0, token, d_x[:n].to(d_hidden.dtype))
    return Gradients(
        d_hidden,
        d_weights[dispatch.position].view(weights.shape),
        None if d_up is None else (d_up.A, d_up.B),
        None if d_down is None else (d_down.A, d_down.B),
    )


class _Sums:
    """The gradients of one projection's factors, of all experts."""

    def __init__(self, factors: LowRank) -> None:
        self.A, self.B = torch.zeros_like(factors.A), torch.zeros_like(factors.B)
        self._of_A, self._of_B = self.A.unbind(0), self.B.unbind(0)
        self._scaling = factors.scaling

    def add(self, expert: int, n: int, v: Tensor, x: Tensor, grad: Tensor, u: Tensor, w: Tensor | None) -> None:
        """Write those of one expert: ``s (w v)^T x`` and ``grad^T (w u)``, of its first n rows alone."""
        v *= self._scaling
        u = u.clone()  # what was kept stays as it is
        if w is not None:
            v[:n] *= w
            u[:n] *= w
        v[n:] = 0
        u[n:] = 0
        self._of_A[expert].copy_(torch.mm(v.t(), x))
        self._of_B[expert].copy_(torch.mm(grad.t(), u))


def _accumulator(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)
