"""One autograd function for the whole expert MLP: up, gate, down and weighted sum, with a low-rank update of each.

It takes experts with an activation in closed form and at most one update each of a projection, as one active adapter
has; all others take the form of two functions in `experts_mlp`. On a CPU it runs groups of experts one after the other
(`fused_loop`), on other devices and under torch.compile all rows at once (`fused_grouped`).
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trl_moe_ext.kernels import fused_grouped, fused_loop
from trl_moe_ext.kernels.checkpointing import is_checkpointed
from trl_moe_ext.kernels.dispatch import Dispatch, sort_by_expert
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights, experts_mlp, identity_weight
from trl_moe_ext.kernels.fused_parts import Factors, Frozen, Kept
from trl_moe_ext.kernels.low_rank import LowRank, Updates, are_apart

# (token, slot) pairs that the grouped back end takes at once. Its temporary tensors have a row for each: of
# Qwen3-30B-A3B some 0.5 GB for the 8,192 tokens that this is, however long a batch is. The loop has bounds of its own.
_PAIRS_AT_ONCE = 65_536


def fused_experts_mlp(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: ExpertsWeights,
    up_updates: Updates,
    down_updates: Updates,
    gate_updates: Updates = (),
    save_activations: str = "gate_up",
) -> Tensor:
    """As `experts_mlp`, without a row for each (token, slot) pair but those that the backward pass needs.

    Args:
        hidden_states, top_k_index, top_k_weights, weights, up_updates, down_updates, gate_updates: see `experts_mlp`.
        save_activations: ``gate_up`` keeps the ``(S, 2I)`` output of the first projection for the backward pass,
            ``none`` computes it again. Under a checkpoint, which computes it again anyway, both are ``gate_up``.
    """
    keep = save_activations == "gate_up" or is_checkpointed()
    if not _is_taken(weights, up_updates, down_updates):
        two = partial(
            experts_mlp, hidden_states, top_k_index, top_k_weights, weights, up_updates, down_updates, gate_updates
        )
        # A seed is given to dropout, so the second run sees the same masks without a generator's help.
        recomputed: Tensor = two() if keep else checkpoint(two, use_reentrant=False, preserve_rng_state=False)
        return recomputed
    factors = up_updates, down_updates
    num_tokens, top_k = top_k_index.shape
    at_once = max(1, _PAIRS_AT_ONCE // top_k) if _back_end(hidden_states) is fused_grouped else num_tokens
    parts = [
        _part(hidden_states, top_k_index, top_k_weights, weights, factors, keep, slice(start, start + at_once))
        for start in range(0, max(num_tokens, 1), max(at_once, 1))
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if weights.identity_experts:
        out = out + hidden_states * identity_weight(top_k_index, top_k_weights, weights)
    return out.to(hidden_states.dtype)


def _part(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    weights: ExpertsWeights,
    factors: Factors,
    keep: bool,
    tokens: slice,
) -> Tensor:
    """The output for some of the tokens, in the dtype of the frozen weights."""
    first_pair = tokens.start * top_k_index.shape[1]
    up, down = (tuple(update._replace(first_pair=first_pair) for update in updates) for updates in factors)
    out: Tensor = _FusedMLP.apply(  # type: ignore[no-untyped-call]
        hidden_states[tokens].to(weights.up.dtype),
        top_k_weights[tokens],
        weights,
        (up, down),
        sort_by_expert(top_k_index[tokens], weights.up.shape[0]),
        keep,
        *(factor for update in (*up, *down) for factor in (update.A, update.B)),
    )
    return out


def _is_taken(weights: ExpertsWeights, up_updates: Updates, down_updates: Updates) -> bool:
    frozen = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    return (
        weights.closed_form is not None
        and weights.gate is None
        and weights.post_norm is None
        and are_apart(up_updates)
        and are_apart(down_updates)
        and not any(w is not None and w.requires_grad for w in frozen)
    )


def _back_end(hidden: Tensor) -> ModuleType:
    """Loops read the number of each expert's rows, which a GPU would have to be waited for."""
    return fused_loop if hidden.device.type == "cpu" and not torch.compiler.is_compiling() else fused_grouped


class _FusedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        top_k_weights: Tensor,
        weights: ExpertsWeights,
        factors: Factors,
        dispatch: Dispatch,
        keep: bool,
        *leaves: Tensor,
    ) -> Tensor:
        assert weights.closed_form is not None
        tensors = (weights.up, weights.down, weights.up_bias, weights.down_bias)
        frozen = Frozen(*tensors, weights.closed_form, weights.weights_on_input)
        with torch.autocast(hidden.device.type, enabled=False):
            back_end = _back_end(hidden)
            result: tuple[Tensor, Kept] = back_end.forward(hidden, top_k_weights, frozen, factors, dispatch, keep)
            out, kept = result
        # Number and shapes of the saved tensors do not depend on the routing: non-reentrant checkpointing compares
        # them, and a recompute may route otherwise.
        ctx.save_for_backward(hidden, top_k_weights, *tensors, *dispatch[:3], *kept, *leaves)
        ctx.back_end = back_end
        ctx.rest = frozen[4:], dispatch.top_k, [[update[2:] for update in updates] for updates in factors]
        return out.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, top_k_weights, *rest = ctx.saved_tensors
        up_weight, down_weight, up_bias, down_bias, order, position, offsets, *rest = rest
        kept, leaves = rest[:3], rest[3:]
        how, top_k, options = ctx.rest
        pairs = zip(leaves[::2], leaves[1::2], strict=True)
        up, down = (tuple(LowRank(*next(pairs), *each) for each in of_projection) for of_projection in options)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = ctx.back_end.backward(
                grad.to(hidden.dtype),
                hidden,
                top_k_weights,
                Kept(*kept),
                Frozen(up_weight, down_weight, up_bias, down_bias, *how),
                (up, down),
                Dispatch(order, position, offsets, top_k),
                needs_hidden=ctx.needs_input_grad[0],
            )
        d_hidden = None if gradients.hidden is None else gradients.hidden.to(hidden.dtype)
        d_leaves = (gradient for pair in (*gradients.up, *gradients.down) for gradient in pair)
        return d_hidden, gradients.weights.to(top_k_weights.dtype), None, None, None, None, *d_leaves
