"""The expert MLP forward and backward over grouped products of all rows at once: what runs on CUDA and compiles.

Nothing here reads a number from the device: shapes follow from T and K alone, whatever the routing.

Legend: T tokens, K top_k, S = T*K routed rows sorted by expert, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.fused_parts import Factors, Frozen, Gradients, Kept, PairsOfFactors
from trl_moe_ext.kernels.grouped import grouped_mm
from trl_moe_ext.kernels.grouped_update import GroupedUpdate
from trl_moe_ext.kernels.row_ops import combine, gated, gated_backward, weight_gradient


def forward(
    hidden: Tensor, weights: Tensor, frozen: Frozen, factors: Factors, dispatch: Dispatch, keep: bool
) -> tuple[Tensor, Kept]:
    """The output, and what the backward pass needs.

    Args:
        hidden: ``(T, H)`` in the dtype of the frozen weights.
        weights: ``(T, K)`` routing weights, in their own dtype.
        factors: of the up and the down projection.
        keep: also the first projection's output, which is computed again otherwise.

    Returns:
        ``(T, H)`` in the dtype of `hidden`, and tensors whose shapes do not depend on the routing.
    """
    up, down = (GroupedUpdate(f, dispatch, hidden) if f else None for f in factors)
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
    up, down = (GroupedUpdate(f, dispatch, hidden) if f else None for f in factors)
    h = kept.h if kept.h.numel() else _first_projection(hidden, weights, frozen, up, kept.up, dispatch)[0]
    d_h, d_w, d_down = _through_down(grad, h, weights, kept, frozen, down, dispatch)
    del h

    d_up: PairsOfFactors = ()
    d_hidden = None
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
        d_up = (*zip(up.dA(v, _inputs(hidden, weights, frozen, dispatch)), d_B, strict=True),)

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
    down: GroupedUpdate | None,
    dispatch: Dispatch,
) -> tuple[Tensor, Tensor | None, PairsOfFactors]:
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
    if down is None:
        return d_h, d_w, ()
    return d_h, d_w, (*zip(down.dA(v if w is None else v.mul_(w), a), d_B, strict=True),)


def _inputs(hidden: Tensor, weights: Tensor, frozen: Frozen, dispatch: Dispatch) -> Tensor:
    """``(S, H)``: what the experts see."""
    x = dispatch.gather(hidden)
    return x.mul_(dispatch.rows(weights)) if frozen.weights_on_input else x


def _first_projection(
    hidden: Tensor, weights: Tensor, frozen: Frozen, up: GroupedUpdate | None, u: Tensor | None, dispatch: Dispatch
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
