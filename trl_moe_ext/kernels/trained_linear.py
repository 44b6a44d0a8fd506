"""A grouped linear map of selected experts whose weights are trained: frozen weight plus delta, forward and backward.

With rows x of a selected expert e, frozen weight W_e and trained delta D_e, both ``(in, out)``:

    y  = x (W_e + D_e)      dx = g (W_e + D_e)^T      dD = x^T g

The sum is formed in each direction and never kept. There is no gradient of W, and none of the size of its stack.

Legend: T tokens, K top_k, S = T*K routed rows, E experts, G of them selected, n rows that are computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.checkpointing import is_checkpointed
from trl_moe_ext.kernels.dispatch import Dispatch, sort_by_expert
from trl_moe_ext.kernels.grouped import grouped_mm
from trl_moe_ext.kernels.selected import SelectedExperts
from trl_moe_ext.kernels.trained_products import outer_like, summed_mm


class SelectedRows(NamedTuple):
    """The rows of the selected experts, in ascending order of their expert.

    Attributes:
        dispatch: of those rows. Its `order` is ``(n,)``: on a CPU the rows of selected experts and no others; on other
            devices and under a gradient checkpoint all S, of which those of the others stand at the end. `offsets` are
            ``(E,)``, `position` is ``(S,)``.
        is_selected: ``(T, K)`` bool, whether a slot is one of a selected expert.
        experts: ``(G,)`` int64, the selected experts; None for all.
        slots: ``(n,)`` int64, the place of each row's expert among the selected; G for a row of another.
    """

    dispatch: Dispatch
    is_selected: Tensor
    experts: Tensor | None
    slots: Tensor

    def add_bias(self, rows: Tensor, bias: Tensor | None, delta: Tensor | None) -> Tensor:
        """``(n, out)`` rows plus the bias ``(E, out)`` of each one's expert, with its delta ``(G, out)``."""
        if bias is None:
            return rows
        of_selected = bias if self.experts is None else bias.index_select(0, self.experts)
        if delta is not None:
            of_selected = of_selected + delta
        # Rows of others have none: what follows may not be multiplied by a weight of zero.
        return rows + F.embedding(self.slots, F.pad(of_selected, (0, 0, 0, 1)).to(rows.dtype))

    def to_tokens(self, rows: Tensor, num_tokens: int) -> Tensor:
        """The sum ``(T, out)`` of each token's rows ``(n, out)``, rounded once."""
        return _sum_of_tokens(rows, self.dispatch, num_tokens)


def rows_of_selected(top_k_index: Tensor, selected: SelectedExperts) -> SelectedRows:
    """Where the rows of selected experts are.

    Args:
        top_k_index: ``(T, K)`` integers; E or more stands for an expert that is not here.
        selected: G of the E experts.
    """
    index = top_k_index.clamp(max=selected.num_experts)
    slots = F.pad(selected.slots(index.device), (0, 1), value=len(selected))[index]
    is_selected = slots < len(selected)
    dispatch = sort_by_expert(index.masked_fill(~is_selected, selected.num_experts), selected.num_experts)
    if rows_are_counted(top_k_index):  # then rows of others cost nothing
        dispatch = dispatch._replace(order=dispatch.order[: int(dispatch.offsets[-1])])
    experts = None if len(selected) == selected.num_experts else selected.indices(index.device)
    return SelectedRows(dispatch, is_selected, experts, slots.reshape(-1)[dispatch.order])


def rows_are_counted(top_k_index: Tensor) -> bool:
    """Whether the number of rows may be read: a GPU would be waited for, a checkpoint may route otherwise later."""
    return top_k_index.device.type == "cpu" and not torch.compiler.is_compiling() and not is_checkpointed()


def trained_linear(
    x: Tensor, weight: Tensor, delta: Tensor | None, rows: SelectedRows, *, gather: bool = False
) -> Tensor:
    """Apply the weights of the selected experts to their rows.

    Args:
        x: ``(n, in)`` rows, or with `gather` the ``(T, in)`` tokens themselves: then no copy of them for each row is
            kept for the backward pass.
        weight: ``(E, in, out)``, any strides; frozen.
        delta: ``(G, in, out)``, any floating dtype, in which its gradient comes back; None for zero. It is added in
            the wider dtype of both, and the sum is rounded to that of `weight`.
        rows: which rows there are.

    Returns:
        ``(n, out)`` in the dtype of `weight`; rows of others are zero.
    """
    experts = None if delta is None else rows.experts
    y: Tensor = _TrainedLinear.apply(x.to(weight.dtype), weight, delta, experts, *rows.dispatch, gather)  # type: ignore[no-untyped-call]
    return y


class _TrainedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        delta: Tensor | None,
        experts: Tensor | None,
        order: Tensor,
        position: Tensor,
        offsets: Tensor,
        top_k: int,
        gather: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, delta, experts, order, position, offsets)
        ctx.top_k, ctx.gather = top_k, gather
        rows = Dispatch(order, position, offsets, top_k).gather(x) if gather else x
        with torch.autocast(x.device.type, enabled=False):
            return _product(rows, weight, delta, experts, _ends(offsets, experts))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, delta, experts, order, position, offsets = ctx.saved_tensors
        dispatch, ends = Dispatch(order, position, offsets, ctx.top_k), _ends(offsets, experts)
        grad = grad.contiguous()
        dx = d_delta = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = _product(grad, weight.mT, None if delta is None else delta.mT, experts, ends)
                dx = _sum_of_tokens(dx, dispatch, len(x)) if ctx.gather else dx
            if ctx.needs_input_grad[2]:
                d_delta = outer_like(dispatch.gather(x) if ctx.gather else x, grad, ends, delta)
        return dx, None, d_delta, *([None] * 6)


def _product(rows: Tensor, weight: Tensor, delta: Tensor | None, experts: Tensor | None, ends: Tensor) -> Tensor:
    if delta is None:
        return grouped_mm(rows, weight, ends)
    return summed_mm(rows, weight, delta, experts, ends)


def _ends(offsets: Tensor, experts: Tensor | None) -> Tensor:
    """Where the rows of each expert end, in the order of the deltas, or of `weight` without one."""
    return offsets if experts is None else offsets[experts]


def _sum_of_tokens(rows: Tensor, dispatch: Dispatch, num_tokens: int) -> Tensor:
    if len(dispatch.order) == len(dispatch.position):
        return dispatch.to_slots(rows).sum(dim=1)
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return wide.new_zeros(num_tokens, rows.shape[1]).index_add(0, dispatch.tokens, wide).to(rows.dtype)
