"""The definition of correct: one expert at a time, in plain torch, with ordinary autograd and explicit masks.

It follows the textbook form ``W x + s B A (m.x)`` and shares nothing with the grouped path but the masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.dropout import keep_mask
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.kernels.low_rank import LowRank, Updates


def experts_mlp_reference(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: ExpertsWeights,
    up_updates: Updates,
    down_updates: Updates,
    gate_updates: Updates = (),
) -> Tensor:
    """As `experts_mlp`, slowly and in the dtype of its inputs; in float64 it is the yardstick of the tests."""
    top_k = top_k_index.shape[1]
    dtype = weights.up.dtype
    out = torch.zeros(hidden_states.shape, dtype=torch.promote_types(dtype, top_k_weights.dtype))
    out = out.to(hidden_states.device)
    for expert in range(weights.up.shape[0]):
        token, slot = torch.where(top_k_index == expert)
        pairs = token * top_k + slot
        weight = top_k_weights[token, slot, None]
        x = hidden_states[token].to(dtype)
        if weights.weights_on_input:
            x, weight = x * weight.to(dtype), torch.ones_like(weight)
        h = _linear(x, weights.up, weights.up_bias, up_updates, expert, pairs)
        if weights.gate is not None:
            h = torch.cat([_linear(x, weights.gate, None, gate_updates, expert, pairs), h], dim=-1)
        y = _linear(weights.activation(h), weights.down, weights.down_bias, down_updates, expert, pairs)
        if weights.post_norm is not None:
            y = weights.post_norm(y)
        out = out.index_add(0, token, (y * weight).to(out.dtype))
    for expert in range(weights.up.shape[0], weights.up.shape[0] + weights.identity_experts):
        token, slot = torch.where(top_k_index == expert)
        out = out.index_add(0, token, (hidden_states[token] * top_k_weights[token, slot, None]).to(out.dtype))
    return out.to(hidden_states.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Updates, expert: int, pairs: Tensor) -> Tensor:
    y = F.linear(x, weight[expert].t(), None if bias is None else bias[expert].to(x.dtype))
    for update in updates:
        if expert in update.experts:
            A, B = (factor[update.experts.index(expert)].to(x.dtype) for factor in (update.A, update.B))
            y = y + update.scaling * F.linear(F.linear(_masked(x, update, pairs), A), B)
    return y


def _masked(x: Tensor, update: LowRank, pairs: Tensor) -> Tensor:
    if update.seed is None or update.dropout == 0.0:
        return x
    keep = keep_mask(update.seed, pairs, x.shape[-1], update.dropout).to(x.dtype)
    return x * keep / (1.0 - update.dropout)
