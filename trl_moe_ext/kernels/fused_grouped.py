"""The expert MLP forward and backward over grouped products of all rows at once: what runs on CUDA and compiles.

Nothing here reads a number from the device: shapes follow from T and K alone, whatever the routing.

Legend: T tokens, K top_k, S = T*K routed rows sorted by expert, E experts, H hidden, I intermediate, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.fused_parts import Factors, Frozen, Gradients, Kept
from trl_moe_ext.kernels.grouped import aligned_rank, grouped_mm, grouped_outer
from trl_moe_ext.kernels.lora_linear import LowRank
from trl_moe_ext.kernels.row_ops import add_low_rank, combine, gated, gated_backward, weight_gradient


def forward(
    hidden: Tensor, weights: Tensor, frozen: Frozen, factors: Factors, dispatch: Dispatch, keep: bool
) -> tuple[Tensor, Kept]:
    """The output, and what the backward pass needs.

    Args:
        hidden: ``(T, H)`` in the dtype of the frozen weights.
        weights: ``(T, K)`` routing weights, in their own dtype.
        factors: of the up and the down projection; None where there is no update.
        keep: also the first projection's output, which is computed again otherwise.

    Returns:
        ``(T, H)`` in the dtype of `hidden`, and tensors whose shapes do not depend on the routing.
    """
    up, down = (None if f is None else _Update(f, dispatch, hidden) for f in factors)
    h, u_up = _first_projection(hidden, weights, frozen, up, None, dispatch)
    a = gated(frozen.gate, h)
    u_down = hidden.new_empty(0) if down is None else down.u(a)
    kept = Kept(h if keep else hidden.new_empty(0), u_up, u_down)
    del h
    y = _product(a, frozen.down, dispatch)
    del a
    if down is not None:
        down.add_y(y, u_down)
    if frozen.down_bias is not None:
        y += _with_zero(frozen.down_bias, y)[_experts(dispatch)]
    return combine(y, None if frozen.weights_on_input else weights, dispatch), kept


def backward(
    grad: Tensor,
    hidden: Tensor,
    weights: Tensor,
    kept: Kept,
    frozen: Frozen,
    factors: Factors,
    dispatch: Dispatch,
    needs_hidden: bool,
) -> Gradients:
    """Every gradient from that of the output.

    With the gradient g of a token, the routing weight's is ``<g, y> = <da, a> + <g, bias>``, where da is that of the
    activation before the weight: no output is needed. On the input it is ``<dx, x>``, where dx is that of ``w x``.

    Args:
        grad: ``(T, H)`` in the dtype of `hidden`.
        kept: from `forward`; left as it is.
        needs_hidden: whether the gradient of `hidden` is wanted.

    Returns:
        That of `hidden` in its dtype, of `weights` in float32 or wider, of the factors in theirs.
    """
    on_output = not frozen.weights_on_input
    up, down = (None if f is None else _Update(f, dispatch, hidden) for f in factors)
    h = kept.h if kept.h.numel() else _first_projection(hidden, weights, frozen, up, kept.up, dispatch)[0]
    d_h, d_w, d_down = _through_down(grad, h, weights, kept, frozen, down, dispatch)
    del h

    d_up = d_hidden = None
    if up is not None:
        v = up.v(d_h)
        d_B = up.dB(d_h, kept.up)
    if needs_hidden or not on_output:
        dx = _product(d_h, frozen.up.mT, dispatch)
        del d_h
        if up is not None:
            up.add_dx(dx, v)
        if not on_output:
            d_w = weight_gradient(dispatch.gather(hidden), dx, weights, dispatch)
        if needs_hidden:
            d_hidden = combine(dx, None if on_output else weights, dispatch)
        del dx
    if up is not None:
        d_up = up.dA(v, _inputs(hidden, weights, frozen, dispatch)), d_B

    assert d_w is not None  # it is on the output or on the input
    d_weights = d_w[dispatch.position].view(weights.shape)
    if on_output and frozen.down_bias is not None:
        d_weights += _biases_seen(grad, frozen.down_bias, dispatch)
    return Gradients(d_hidden, d_weights, d_up, d_down)


def _through_down(
    grad: Tensor,
    h: Tensor,
    weights: Tensor,
    kept: Kept,
    frozen: Frozen,
    down: _Update | None,
    dispatch: Dispatch,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Back through the second projection and the activation.

    Returns:
        The gradient of h; ``(S,)``, that of the routing weights without that of a bias, None if they are on the
        input; and that of the factors.
    """
    w = None if frozen.weights_on_input else dispatch.rows(weights)
    g = dispatch.gather(grad)
    d_a = _product(g, frozen.down.mT, dispatch)
    if down is not None:
        v = down.v(g)
        down.add_dx(d_a, v)
        # The weight belongs to g; on the rank-sized tensors it costs next to nothing.
        d_B = down.dB(g, kept.down if w is None else (kept.down * w).to(g.dtype))
    del g
    d_h, a, d_w = gated_backward(frozen.gate, h, d_a, w, dispatch)
    return d_h, d_w, None if down is None else (down.dA(v if w is None else v.mul_(w), a), d_B)


class _Update:
    """One projection's low-rank update, on all rows, in their dtype; every method is a line of these formulas.

    For rows x, the gradient g of the projection's output, scaling s and dropout m, as in `lora_linear`:
    ``u = s A (m.x)``, ``y += B u``, ``v = s B^T g``, ``dx += m.(A^T v)``, ``dA = v (m.x)^T``, ``dB = g u^T``.
    """

    def __init__(self, factors: LowRank, dispatch: Dispatch, like: Tensor) -> None:
        self._factors, self._dispatch, self._rank = factors, dispatch, factors.A.shape[1]
        self._A, self._B = factors.A.to(like.dtype), factors.B.to(like.dtype)
        # Zeros in place of the ranks that the device's products need in addition change no result.
        missing = aligned_rank(self._rank, like) - self._rank
        if missing:
            self._A, self._B = F.pad(self._A, (0, 0, 0, missing)), F.pad(self._B, (0, missing))

    def u(self, x: Tensor) -> Tensor:
        return _product(self._dropped(x), self._A.mT, self._dispatch).mul_(self._factors.scaling)

    def add_y(self, rows: Tensor, u: Tensor) -> None:
        add_low_rank(rows, u, self._B.mT, self._dispatch)

    def v(self, g: Tensor) -> Tensor:
        return _product(g, self._B, self._dispatch).mul_(self._factors.scaling)

    def add_dx(self, rows: Tensor, v: Tensor) -> None:
        if self._factors.seed is None:
            add_low_rank(rows, v, self._A, self._dispatch)
        else:
            rows += self._dropped(_product(v, self._A, self._dispatch))

    def dA(self, v: Tensor, x: Tensor) -> Tensor:  # noqa: N802
        dA = grouped_outer(v, self._dropped(x), self._dispatch.offsets)
        return dA[:, : self._rank].to(self._factors.A.dtype)

    def dB(self, g: Tensor, u: Tensor) -> Tensor:  # noqa: N802
        return grouped_outer(g, u, self._dispatch.offsets)[..., : self._rank].to(self._factors.B.dtype)

    def _dropped(self, rows: Tensor) -> Tensor:
        return self._factors.dropped(rows, self._dispatch.order)


def _inputs(hidden: Tensor, weights: Tensor, frozen: Frozen, dispatch: Dispatch) -> Tensor:
    """``(S, H)``: what the experts see."""
    x = dispatch.gather(hidden)
    return x.mul_(dispatch.rows(weights)) if frozen.weights_on_input else x


def _first_projection(
    hidden: Tensor, weights: Tensor, frozen: Frozen, up: _Update | None, u: Tensor | None, dispatch: Dispatch
) -> tuple[Tensor, Tensor]:
    """The output of the first projection and the rank-sized u in it, which is computed unless given."""
    x = _inputs(hidden, weights, frozen, dispatch)
    if u is None:
        u = hidden.new_empty(0) if up is None else up.u(x)
    h = _product(x, frozen.up, dispatch)
    del x
    if up is not None:
        up.add_y(h, u)
    if frozen.up_bias is not None:
        h += _with_zero(frozen.up_bias, h)[_experts(dispatch)]
    return h, u


def _product(rows: Tensor, weight: Tensor, dispatch: Dispatch) -> Tensor:
    """Rows of no expert may hold anything after it: what they would get into leaves them out."""
    return grouped_mm(rows, weight, dispatch.offsets, zero_tail=False)


def _experts(dispatch: Dispatch) -> Tensor:
    """``(S,)`` the expert of each row; E for rows of none."""
    rows = torch.arange(dispatch.order.shape[0], dtype=dispatch.offsets.dtype, device=dispatch.order.device)
    return torch.searchsorted(dispatch.offsets, rows, right=True)


def _with_zero(bias: Tensor, like: Tensor) -> Tensor:
    """``(E + 1, n)``: the biases, and that of rows of no expert."""
    return F.pad(bias.to(like.dtype), (0, 0, 0, 1))


def _biases_seen(grad: Tensor, bias: Tensor, dispatch: Dispatch) -> Tensor:
    """``(T, K)``: the product of each token's gradient with the bias of each of its experts, zero for none."""
    experts = _experts(dispatch)[dispatch.position].view(-1, dispatch.top_k)
    return (grad @ _with_zero(bias, grad).t()).gather(1, experts)
