"""One autograd function for the whole expert MLP: up, gate, down and weighted sum, with a low-rank update of each.

It takes experts with at most one active adapter and an activation with a closed form; all others take the form of two
functions in `experts_mlp`. On a CPU it runs groups of experts one after the other (`fused_loop`), on other devices and
under torch.compile all rows at once (`fused_grouped`).
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
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights, Updates, experts_mlp, identity_weight
from trl_moe_ext.kernels.fused_parts import Frozen, Kept
from trl_moe_ext.kernels.lora_linear import LowRank

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
    up, down = (updates[0] if updates else None for updates in (up_updates, down_updates))
    num_tokens, top_k = top_k_index.shape
    at_once = max(1, _PAIRS_AT_ONCE // top_k) if _back_end(hidden_states) is fused_grouped else num_tokens
    parts = [
        _part(hidden_states, top_k_index, top_k_weights, weights, up, down, keep, slice(start, start + at_once))
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
    up: LowRank | None,
    down: LowRank | None,
    keep: bool,
    tokens: slice,
) -> Tensor:
    """The output for some of the tokens, in the dtype of the frozen weights."""
    first_pair = tokens.start * top_k_index.shape[1]
    up, down = (None if update is None else update._replace(first_pair=first_pair) for update in (up, down))
    out: Tensor = _FusedMLP.apply(  # type: ignore[no-untyped-call]
        hidden_states[tokens].to(weights.up.dtype),
        top_k_weights[tokens],
        *((None, None) if up is None else (up.A, up.B)),
        *((None, None) if down is None else (down.A, down.B)),
        weights,
        (up, down),
        sort_by_expert(top_k_index[tokens], weights.up.shape[0]),
        keep,
    )
    return out


def _is_taken(weights: ExpertsWeights, up_updates: Updates, down_updates: Updates) -> bool:
    frozen = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    return (
        weights.closed_form is not None
        and weights.gate is None
        and weights.post_norm is None
        and max(len(up_updates), len(down_updates)) <= 1
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
        up_A: Tensor | None,
        up_B: Tensor | None,
        down_A: Tensor | None,
        down_B: Tensor | None,
        weights: ExpertsWeights,
        updates: tuple[LowRank | None, LowRank | None],
        dispatch: Dispatch,
        keep: bool,
    ) -> Tensor:
        assert weights.closed_form is not None
        tensors = (weights.up, weights.down, weights.up_bias, weights.down_bias)
        frozen = Frozen(*tensors, weights.closed_form, weights.weights_on_input)
        with torch.autocast(hidden.device.type, enabled=False):
            back_end = _back_end(hidden)
            result: tuple[Tensor, Kept] = back_end.forward(hidden, top_k_weights, frozen, updates, dispatch, keep)
            out, kept = result
        # Number and shapes of the saved tensors do not depend on the routing: non-reentrant checkpointing compares
        # them, and a recompute may route otherwise.
        ctx.save_for_backward(
            hidden, top_k_weights, up_A, up_B, down_A, down_B, *tensors, *dispatch[:3], *kept
        )  # fmt: skip
        ctx.back_end = back_end
        ctx.rest = frozen[4:], dispatch.top_k, [None if update is None else update[2:] for update in updates]
        return out.to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, top_k_weights, up_A, up_B, down_A, down_B, *rest = ctx.saved_tensors
        up_weight, down_weight, up_bias, down_bias, order, position, offsets, *kept = rest
        how, top_k, options = ctx.rest
        updates = (
            None if options[0] is None else LowRank(up_A, up_B, *options[0]),
            None if options[1] is None else LowRank(down_A, down_B, *options[1]),
        )
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = ctx.back_end.backward(
                grad.to(hidden.dtype),
                hidden,
                top_k_weights,
                Kept(*kept),
                Frozen(up_weight, down_weight, up_bias, down_bias, *how),
                updates,
                Dispatch(order, position, offsets, top_k),
                needs_hidden=ctx.needs_input_grad[0],
            )
        d_hidden = None if gradients.hidden is None else gradients.hidden.to(hidden.dtype)
        d_factors = (*(gradients.up or (None, None)), *(gradients.down or (None, None)))
        return d_hidden, gradients.weights.to(top_k_weights.dtype), *d_factors, None, None, None, None
