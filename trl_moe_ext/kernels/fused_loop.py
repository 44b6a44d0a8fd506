"""The expert MLP forward and backward on a CPU: one group of experts after the other.

All experts of a group have the same update of each projection, or none: then only the frozen products run.

The two large products of an expert run on its own rows, one expert at a time. All that is small, the gathers, the
gate and the rank-sized products, runs once for a group. So intermediate results stay in the cache, and no tensor has a
row for each (token, slot) pair but what is kept for the backward pass.

Legend: T tokens, K top_k, S = T*K routed rows, E experts, H hidden, I intermediate, r rank; a group has R rows,
those of its experts and some in excess, whose weight is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.expert_groups import ExpertGroup, bound_of_rows, group_experts, idle_experts
from trl_moe_ext.kernels.expert_products import ExpertProducts
from trl_moe_ext.kernels.fused_parts import Factors, Frozen, Gradients, Kept
from trl_moe_ext.kernels.fused_update import ProjectionUpdates, Update


def forward(
    hidden: Tensor, weights: Tensor, frozen: Frozen, factors: Factors, dispatch: Dispatch, keep: bool
) -> tuple[Tensor, Kept]:
    """The output ``(T, H)`` in float32 or wider, and what the backward pass needs.

    Args:
        hidden: ``(T, H)`` in the dtype of the frozen weights.
        weights: ``(T, K)`` routing weights, in their own dtype.
        frozen: the experts.
        factors: of the up and the down projection.
        dispatch: the routing.
        keep: also the first projection's output, which is computed again otherwise.
    """
    wide = _wide(hidden)
    ups, downs, groups = _grouped(factors, dispatch, hidden.dtype)
    products = ExpertProducts(frozen, groups, hidden.dtype)
    rows = bound_of_rows(len(dispatch.order))
    kept = Kept(
        hidden.new_empty(rows if keep else 0, frozen.up.shape[2]),
        *(torch.empty(rows if all_of.rank else 0, all_of.rank, dtype=wide) for all_of in (ups, downs)),
    )
    out = torch.zeros(hidden.shape, dtype=wide)
    for group in groups:
        up, down = ups.of(group), downs.of(group)
        inside, outside = _row_weights(group, weights, frozen)
        x = _inputs(hidden, group, inside)
        if up is not None:
            up.part_of(kept.up, group).copy_(up.project(x, group))
        h = _first_projection(x, kept, frozen, up, products, group)
        a = frozen.gate.forward(h)
        y = products.down(a, group)
        if down is not None:
            u = down.project(a, group)
            down.part_of(kept.down, group).copy_(u)
            down.expand(y, u, group)
        if frozen.down_bias is not None:
            group.by_expert(y).add_(frozen.down_bias[group.chosen, None])
        out.index_add_(0, group.tokens, y.to(wide).mul_(outside.to(wide)))
    return out, kept


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

    The routing weight's needs no output: with the gradient g of a token, ``<g, y> = <da, a>`` where da is the gradient
    of the activation before the weight, plus ``<g, bias>``. A weight w on the input has ``<dx, x>`` with the gradient
    of ``w * x``.
    """
    wide = _wide(hidden)
    ups, downs, groups = _grouped(factors, dispatch, hidden.dtype)
    idle = idle_experts(dispatch)
    products = ExpertProducts(frozen, groups, hidden.dtype)
    d_hidden = torch.zeros(hidden.shape, dtype=wide) if needs_hidden else None
    d_weights = torch.zeros(len(dispatch.order), dtype=wide)
    is_kept, needs_d_x = kept.h.numel() > 0, needs_hidden or frozen.weights_on_input
    # Of every token with every expert: one small product, where rows would need a copy of their gradients.
    bias = None if frozen.weights_on_input else frozen.down_bias
    through_bias = None if bias is None else grad.to(wide) @ bias.to(wide).T
    for group in groups:
        up, down = ups.of(group), downs.of(group)
        inside, outside = _row_weights(group, weights, frozen)
        g = grad.index_select(0, group.tokens)
        x = hidden[:0] if is_kept and up is None else _inputs(hidden, group, inside)  # without rows, nothing reads it
        h = kept.h[group.rows] if is_kept else _first_projection(x, kept, frozen, up, products, group)
        a = frozen.gate.forward(h)
        d_a = products.down_back(g, group)
        if down is not None:
            down.backward(d_a, g, a, down.part_of(kept.down, group), group, outside)
        if not frozen.weights_on_input:
            d_w = (d_a * a).sum(dim=-1, dtype=wide)
            if through_bias is not None:
                d_w += through_bias[group.tokens, group.expert_of_rows()]
            _add_to_pairs(d_weights, group, d_w)
        if up is None and not needs_d_x:
            continue
        d_h = frozen.gate.backward(h, d_a.mul_(outside))
        d_x = products.up_back(d_h, group) if needs_d_x else None
        if up is not None:
            up.backward(d_x, d_h, x, up.part_of(kept.up, group), group, None)
        if d_x is None:
            continue
        d_x = d_x.to(wide)
        if inside is not None:
            _add_to_pairs(d_weights, group, (d_x * hidden.index_select(0, group.tokens)).sum(dim=-1))
            d_x *= inside
        if d_hidden is not None:
            d_hidden.index_add_(0, group.tokens, d_x)
    return Gradients(d_hidden, d_weights.view(weights.shape), ups.gradients(idle), downs.gradients(idle))


def _grouped(
    factors: Factors, dispatch: Dispatch, dtype: torch.dtype
) -> tuple[ProjectionUpdates, ProjectionUpdates, list[ExpertGroup]]:
    """The updates of both projections, and groups of experts that have the same of both."""
    ups, downs = (ProjectionUpdates(updates, len(dispatch.offsets)) for updates in factors)
    return ups, downs, group_experts(dispatch, dtype, [*zip(ups.number_of, downs.number_of, strict=True)])


def _row_weights(group: ExpertGroup, weights: Tensor, frozen: Frozen) -> tuple[Tensor | None, Tensor]:
    """What multiplies each row's input (None for one) and its output, ``(R, 1)``; zero outside on rows in excess."""
    weight = weights.reshape(-1)[group.pairs].unsqueeze(-1)
    return (weight, group.is_own.to(weight.dtype)) if frozen.weights_on_input else (None, weight * group.is_own)


def _inputs(hidden: Tensor, group: ExpertGroup, inside: Tensor | None) -> Tensor:
    """``(R, H)``: what the experts see."""
    x = hidden.index_select(0, group.tokens)
    return x if inside is None else x.mul_(inside)


def _first_projection(
    x: Tensor, kept: Kept, frozen: Frozen, up: Update | None, products: ExpertProducts, group: ExpertGroup
) -> Tensor:
    h = products.up(x, group, kept.h[group.rows] if kept.h.numel() else None)
    if up is not None:
        up.expand(h, up.part_of(kept.up, group), group)
    if frozen.up_bias is not None:
        group.by_expert(h).add_(frozen.up_bias[group.chosen, None])
    return h


def _add_to_pairs(per_pair: Tensor, group: ExpertGroup, values: Tensor) -> None:
    """Add each row's value at its (token, slot) pair; a row in excess adds zero."""
    per_pair.index_add_(0, group.pairs, values * group.is_own.view(-1))


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)
