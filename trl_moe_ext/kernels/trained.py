"""The MLP of routed experts of which some are trained in full: their own weights, by what is added to them.

The others run through the fused kernel and have no weight gradient at all. What is kept for the backward pass beside
what that kernel keeps: the tokens, and for each row of a selected expert the output of its first projection, of its
activation with what autograd keeps inside, and of its second projection. On a CPU those rows are all there are.
Elsewhere, and under a gradient checkpoint, there is a row for each (token, slot) pair, whatever the routing, and a
long batch runs in parts of its tokens. That bounds what is not kept, forward and backward: the rows of inputs and of
their gradients, which are the widest. It does not bound what is kept, of which all parts together have as much as one
would. The price is a second gradient of the deltas of a projection while that of a part is added to the others'.

Legend: T tokens, K top_k, S rows, E experts, G of them selected, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trl_moe_ext.kernels.dispatch import sort_by_expert
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights, identity_weight
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.lora_linear import lora_linear
from trl_moe_ext.kernels.selected import SelectedExperts
from trl_moe_ext.kernels.trained_linear import SelectedRows, rows_are_counted, rows_of_selected, trained_linear

# (token, slot) pairs that run at once where every pair has a row: as many as the fused kernel takes for the others.
_PAIRS_AT_ONCE = 65_536


class ExpertsDeltas(NamedTuple):
    """What is added to the frozen weights of selected experts, in the orientation of `ExpertsWeights`.

    Attributes:
        selected: the G experts, in the order of the rows of all deltas.
        up: ``(G, H, 2I)`` or ``(G, H, I)``, any strides and any floating dtype; None if it is not trained.
        down: ``(G, I, H)``, or None.
        gate: ``(G, H, I)`` where the gate has a stack of its own, or None.
        up_bias, down_bias: ``(G, 2I)`` or ``(G, I)``, and ``(G, H)``, or None.
    """

    selected: SelectedExperts
    up: Tensor | None = None
    down: Tensor | None = None
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def trained_experts_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: ExpertsWeights,
    deltas: ExpertsDeltas,
) -> Tensor:
    """Run every token through its experts, the selected ones with their deltas.

    Gradients reach the tokens, the routing weights and the deltas.

    Args:
        hidden_states: ``(T, H)``.
        top_k_index: ``(T, K)`` integers, the chosen experts. An index beyond E and the identity experts marks a slot
            that no expert serves.
        top_k_weights: ``(T, K)`` routing weights, in their own dtype.
        weights: the frozen experts.
        deltas: of the selected ones.

    Returns:
        ``(T, H)`` in the dtype of `hidden_states`.
    """
    num_tokens, top_k = top_k_index.shape
    at_once = max(1, _PAIRS_AT_ONCE // top_k)
    if rows_are_counted(top_k_index) or num_tokens <= at_once:
        return _part(hidden_states, top_k_index, top_k_weights, weights, deltas)
    # The gradients of a split are put together once; that of a slice would be as long as the batch.
    hidden, index, routing = (torch.split(x, at_once) for x in (hidden_states, top_k_index, top_k_weights))
    return torch.cat([_part(*part, weights, deltas) for part in zip(hidden, index, routing, strict=True)])


def _part(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: ExpertsWeights,
    deltas: ExpertsDeltas,
) -> Tensor:
    """The output for some of the tokens."""
    rows = rows_of_selected(top_k_index, deltas.selected)
    out = _selected_experts(hidden_states, top_k_weights, weights, deltas, rows)
    if rows.experts is not None:
        # Slots of the selected are given to nobody: they cost nothing and receive zero.
        others = top_k_index.masked_fill(rows.is_selected, weights.up.shape[0] + weights.identity_experts)
        out = out + fused_experts_mlp(
            hidden_states, others, top_k_weights.masked_fill(rows.is_selected, 0), weights, (), ()
        )
    elif weights.identity_experts:
        out = out + hidden_states * identity_weight(top_k_index, top_k_weights, weights)
    return out.to(hidden_states.dtype)


def _selected_experts(
    hidden_states: Tensor, top_k_weights: Tensor, weights: ExpertsWeights, deltas: ExpertsDeltas, rows: SelectedRows
) -> Tensor:
    dispatch = rows.dispatch
    row_weights = dispatch.rows(top_k_weights.masked_fill(~rows.is_selected, 0))
    x, gather = hidden_states, True
    if weights.weights_on_input:
        x, gather = dispatch.gather(hidden_states) * row_weights.to(hidden_states.dtype), False
    h = trained_linear(x, weights.up, deltas.up, rows, gather=gather)
    if weights.gate is not None:
        h = torch.cat([trained_linear(x, weights.gate, deltas.gate, rows, gather=gather), h], dim=-1)
    h = weights.activation(rows.add_bias(h, weights.up_bias, deltas.up_bias))
    y = rows.add_bias(trained_linear(h, weights.down, deltas.down, rows), weights.down_bias, deltas.down_bias)
    if weights.post_norm is not None:
        y = weights.post_norm(y)
    return rows.to_tokens(y if weights.weights_on_input else y * row_weights, len(hidden_states))


def trained_rows(
    x: Tensor,
    rows_per_expert: Sequence[int],
    weight: Tensor,
    delta: Tensor,
    selected: SelectedExperts,
) -> Tensor:
    """The same for a single projection that is called with rows sorted by expert.

    Args:
        x: ``(S, in)`` rows.
        rows_per_expert: how many of them each of the E experts has.
        weight: ``(E, in, out)``, frozen.
        delta: ``(G, in, out)``, of the selected experts.
        selected: which they are.

    Returns:
        ``(S, out)`` in the dtype of `weight`.
    """
    counts = torch.tensor(rows_per_expert, device=x.device)
    experts = torch.arange(selected.num_experts, device=x.device)
    index = experts.repeat_interleave(counts, output_size=len(x)).unsqueeze(1)
    rows = rows_of_selected(index, selected)
    y = rows.to_tokens(trained_linear(x, weight, delta, rows, gather=True), len(x))
    if rows.experts is not None:
        others = sort_by_expert(index.masked_fill(rows.is_selected, selected.num_experts), selected.num_experts)
        y = y + others.to_slots(lora_linear(x, weight, (), others, gather=True)).squeeze(1)
    return y
