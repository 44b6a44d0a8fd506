"""The MLP of routed experts with low-rank updates on its two projections: up, gate, down, weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trl_moe_ext.kernels.dispatch import Dispatch, combine, sort_by_expert
from trl_moe_ext.kernels.gates import Gate
from trl_moe_ext.kernels.lora_linear import lora_linear
from trl_moe_ext.kernels.low_rank import Updates

__all__ = ["ExpertsWeights", "Updates", "experts_mlp", "identity_weight"]


class ExpertsWeights(NamedTuple):
    """The frozen weights of one module of routed experts, and what stands between its two projections.

    Attributes:
        up: ``(E, H, 2I)`` for gated experts, ``(E, H, I)`` without a gate; a view of any strides.
        down: ``(E, I, H)``.
        up_bias, down_bias: ``(E, 2I)`` or ``(E, I)``, and ``(E, H)``; None without biases.
        activation: from the up projection's ``(S, 2I)`` or ``(S, I)`` to ``(S, I)``.
        post_norm: applied to each expert's ``(S, H)`` output before the routing weights; None without one.
        gate: ``(E, H, I)`` where the gate has a stack of its own; `up` is ``(E, H, I)`` then, and `activation` gets
            the gate's output in front of the up projection's. Such experts have no biases.
        weights_on_input: the routing weights multiply an expert's input instead of its output.
        identity_experts: indices ``E .. E + identity_experts - 1`` stand for experts that return their token.
        closed_form: what `activation` computes, if it is one of `GATES`.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]
    post_norm: Callable[[Tensor], Tensor] | None
    gate: Tensor | None = None
    weights_on_input: bool = False
    identity_experts: int = 0
    closed_form: Gate | None = None


def experts_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: ExpertsWeights,
    up_updates: Updates,
    down_updates: Updates,
    gate_updates: Updates = (),
) -> Tensor:
    """Run every token through its experts, with the active adapters' updates of both projections.

    Args:
        hidden_states: ``(T, H)``.
        top_k_index: ``(T, K)`` integers, the chosen experts.
        top_k_weights: ``(T, K)`` routing weights, in their own dtype.
        weights: the frozen experts.
        up_updates, down_updates, gate_updates: factors of the active adapters for the stacks of these names.

    Returns:
        ``(T, H)`` in the dtype of `hidden_states`.
    """
    dispatch = sort_by_expert(top_k_index, weights.up.shape[0])
    x, gather = hidden_states, True
    if weights.weights_on_input:
        x, gather = dispatch.gather(hidden_states) * dispatch.rows(top_k_weights).to(hidden_states.dtype), False
    h = lora_linear(x, weights.up, up_updates, dispatch, gather=gather)
    if weights.gate is not None:
        h = torch.cat([lora_linear(x, weights.gate, gate_updates, dispatch, gather=gather), h], dim=-1)
    h = weights.activation(_add_bias(h, weights.up_bias, top_k_index, dispatch))
    y = lora_linear(h, weights.down, down_updates, dispatch)
    y = _add_bias(y, weights.down_bias, top_k_index, dispatch)
    if weights.post_norm is not None:
        y = weights.post_norm(y)
    out = dispatch.to_slots(y).sum(dim=1) if weights.weights_on_input else combine(y, top_k_weights, dispatch)
    if weights.identity_experts:
        out = out + hidden_states * identity_weight(top_k_index, top_k_weights, weights)
    return out.to(hidden_states.dtype)


def identity_weight(top_k_index: Tensor, top_k_weights: Tensor, weights: ExpertsWeights) -> Tensor:
    """``(T, 1)``: the weight with which each token goes to identity experts."""
    experts = weights.up.shape[0]
    is_identity = (top_k_index >= experts) & (top_k_index < experts + weights.identity_experts)
    return (top_k_weights * is_identity).sum(dim=-1, keepdim=True)


def _add_bias(rows: Tensor, bias: Tensor | None, top_k_index: Tensor, dispatch: Dispatch) -> Tensor:
    if bias is None:
        return rows
    expert = top_k_index.reshape(-1)[dispatch.order]
    # A slot of no expert of this rank has no bias either.
    served = (expert < bias.shape[0]).unsqueeze(-1)
    return rows + bias[expert.clamp(max=bias.shape[0] - 1)].to(rows.dtype) * served
