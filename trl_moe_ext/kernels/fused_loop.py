"""The expert MLP forward and backward on a CPU: one run of neighbouring experts after the other.

The two large products of an expert run on its own rows, one expert at a time. All that is small, the gathers, the
gate and the rank-sized products, runs once for a run of experts. So intermediate results stay in the cache, and no
tensor has a row for each (token, slot) pair but what is kept for the backward pass.

Legend: T tokens, K top_k, S = T*K routed rows, E experts, H hidden, I intermediate, r rank; a run has R rows, those of
its experts and some in excess, whose weight is zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.fused_parts import Frozen, Gradients, Kept
from trl_moe_ext.kernels.fused_update import Update
from trl_moe_ext.kernels.lora_linear import LowRank
from trl_moe_ext.kernels.expert_groups import ExpertGroup, bound_of_rows, group_experts

Factors = tuple[LowRank | None, LowRank | None]


def forward(
    hidden: Tensor, weights: Tensor, frozen: Frozen, factors: Factors, dispatch: Dispatch, keep: bool
) -> tuple[Tensor, Kept]:
    """The output ``(T, H)`` in float32 or wider, and what the backward pass needs.

    Args:
        hidden: ``(T, H)``.
        weights: ``(T, K)`` routing weights.
        frozen: the experts.
        factors: of the up and the down projection.
        dispatch: the routing.
        keep: also the first projection's output, which is computed again otherwise.
    """
    wide = _wide(hidden)
    up, down = (None if f is None else Update(f) for f in factors)
    products = _Products(frozen, groups := group_experts(dispatch, hidden.dtype), hidden.dtype)
    rows = bound_of_rows(len(dispatch.order))
    kept = Kept(
        hidden.new_empty(rows if keep else 0, frozen.up.shape[2]),
        *(torch.empty(rows if f else 0, f.A.shape[1] if f else 0, dtype=wide) for f in factors),
    )
    out = torch.zeros(hidden.shape, dtype=wide)
    for group in groups:
        inside, outside = _row_weights(group, weights, frozen)
        x = _inputs(hidden, group, inside)
        if up is not None:
            kept.up[group.rows] = up.project(x, group)
        h = _first_projection(x, kept, frozen, up, products, group)
        a = frozen.gate.forward(h)
        y = products.down(a, group)
        if down is not None:
            kept.down[group.rows] = u = down.project(a, group)
            down.expand(y, u, group)
        if frozen.down_bias is not None:
            group.by_expert(y).add_(frozen.down_bias[group.index, None])
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
    up, down = (None if f is None else Update(f) for f in factors)
    products = _Products(frozen, groups := group_experts(dispatch, hidden.dtype), hidden.dtype)
    d_hidden = torch.zeros(hidden.shape, dtype=wide)
    d_weights = torch.zeros(len(dispatch.order), dtype=wide)
    needs_x = needs_hidden or frozen.weights_on_input
    for group in groups:
        inside, outside = _row_weights(group, weights, frozen)
        g = grad.index_select(0, group.tokens)
        x = _inputs(hidden, group, inside) if up is not None or not kept.h.numel() else None
        h = kept.h[group.rows] if x is None or kept.h.numel() else _first_projection(x, kept, frozen, up, products, group)
        a = frozen.gate.forward(h)
        d_a = products.down_back(g, group)
        if down is not None:
            down.backward(d_a, g, a, kept.down[group.rows], group, outside)
        if not frozen.weights_on_input:
            d_w = (d_a.to(wide) * a).sum(dim=-1)
            if frozen.down_bias is not None:
                bias = frozen.down_bias[group.index, :, None].to(wide)
                d_w += torch.bmm(group.by_expert(g.to(wide)), bias).view(-1)
            _put(d_weights, group, d_w)
        d_h = frozen.gate.backward(h, d_a.mul_(outside))
        d_x = products.up_back(d_h, group) if needs_x else None
        if up is not None and x is not None:
            up.backward(d_x, d_h, x, kept.up[group.rows], group, None)
        if d_x is None:
            continue
        d_x = d_x.to(wide)
        if inside is not None:
            _put(d_weights, group, (d_x * hidden.index_select(0, group.tokens)).sum(dim=-1))
            d_x *= inside
        d_hidden.index_add_(0, group.tokens, d_x)
    return Gradients(
        d_hidden if needs_hidden else None,
        d_weights.view(weights.shape),
        None if up is None else (up.d_A, up.d_B),
        None if down is None else (down.d_A, down.d_B),
    )


class _Products:
    """The large products: each expert's rows times its frozen matrix.

    Results are in memory that the next run of the same product writes over. Rows in excess are zero.
    """

    def __init__(self, frozen: Frozen, groups: Sequence[ExpertGroup], dtype: torch.dtype) -> None:
        self._ups, self._downs = frozen.up.unbind(0), frozen.down.unbind(0)
        self._ups_back, self._downs_back = [w.t() for w in self._ups], [w.t() for w in self._downs]
        self._rows, self._dtype = max((len(group.pairs) for group in groups), default=0), dtype
        self._results: dict[str, Tensor] = {}

    def up(self, x: Tensor, group: ExpertGroup, out: Tensor | None = None) -> Tensor:
        """``(R, H)`` to the first projection's output."""
        return self._each("up", x, self._ups, group, out)

    def down(self, a: Tensor, group: ExpertGroup) -> Tensor:
        """``(R, I)`` to ``(R, H)``."""
        return self._each("down", a, self._downs, group)

    def up_back(self, d_h: Tensor, group: ExpertGroup) -> Tensor:
        """The gradient of `up`'s result to that of its rows, ``(R, H)``."""
        return self._each("up_back", d_h, self._ups_back, group)

    def down_back(self, g: Tensor, group: ExpertGroup) -> Tensor:
        """``(R, H)`` to ``(R, I)``."""
        return self._each("down_back", g, self._downs_back, group)

    def _each(self, name: str, x: Tensor, weights: Sequence[Tensor], group: ExpertGroup, out: Tensor | None = None) -> Tensor:
        if out is None:
            width = weights[0].shape[1]
            if name not in self._results:
                self._results[name] = torch.empty(self._rows, width, dtype=self._dtype)
            out = self._results[name][: len(x)]
        each = zip((weights[expert] for expert in group.experts), group.sizes, group.by_expert(x).unbind(0), group.by_expert(out).unbind(0), strict=True)
        for weight, size, rows, results in each:
            torch.mm(rows[:size], weight, out=results[:size])
            if size < len(results):
                results[size:] = 0
        return out


def _first_projection(
    x: Tensor, kept: Kept, frozen: Frozen, up: Update | None, products: _Products, group: ExpertGroup
) -> Tensor:
    h = products.up(x, group, kept.h[group.rows] if kept.h.numel() else None)
    if up is not None:
        up.expand(h, kept.up[group.rows], group)
    if frozen.up_bias is not None:
        group.by_expert(h).add_(frozen.up_bias[group.index, None])
    return h


def _row_weights(group: ExpertGroup, weights: Tensor, frozen: Frozen) -> tuple[Tensor | None, Tensor]:
    """What multiplies each row's input (None for one) and its output, ``(R, 1)``; zero outside on rows in excess."""
    weight = weights.reshape(-1)[group.pairs].unsqueeze(-1)
    return (weight, group.is_own.to(weight.dtype)) if frozen.weights_on_input else (None, weight * group.is_own)


def _inputs(hidden: Tensor, group: ExpertGroup, inside: Tensor | None) -> Tensor:
    x = hidden.index_select(0, group.tokens)
    return x if inside is None else x.mul_(inside)


def _put(per_pair: Tensor, group: ExpertGroup, values: Tensor) -> None:
    """Add the rows' values at their (token, slot) pairs; a row in excess adds zero."""
    per_pair.index_add_(0, group.pairs, values * group.is_own.view(-1))


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)
