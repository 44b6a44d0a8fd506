"""Whether a run fits in memory, told before the first process starts. All figures are estimates."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_moe_ext.bench.available import available_bytes
from trl_moe_ext.bench.build import skeleton
from trl_moe_ext.bench.peers import Peer, peer_named
from trl_moe_ext.bench.plan import Request
from trl_moe_ext.bench.subjects import Subject
from trl_moe_ext.errors import ConfigError

# Rows of the hidden and of the intermediate size that a step holds for each routed row and layer: the projections'
# inputs, outputs and gradients, and what stands between. Fitted to measured steps of frozen layers.
_HIDDEN_ROWS, _INNER_ROWS = 10, 16
# Where the config does not say how many experts a token is sent to.
_USUAL_TOP_K = 8


@dataclass(frozen=True)
class Sizes:
    """Of one subject in its dtype.

    Attributes:
        layers: modules of stacked experts.
        experts, hidden, intermediate: of the first of them; zero where experts are Linears of their own.
        top_k: experts a token.
        parameters: of the whole subject.
        expert_parameters: of all stacks of experts.
        weight_bytes: of all parameters.
        is_dense: stock transformers sends every token to every expert.
    """

    layers: int
    experts: int
    hidden: int
    intermediate: int
    top_k: int | None
    parameters: int
    expert_parameters: int
    weight_bytes: int
    is_dense: bool

    @property
    def description(self) -> str:
        """The sizes in the shape letters of the kernels, for a title."""
        if not self.experts:
            return "experts of single Linears"
        return f"E={self.experts} H={self.hidden} I={self.intermediate} top-{self.top_k or '?'}"


def sizes_of(request: Request) -> Sizes:
    """The sizes of what is asked for, without its weights.

    Raises:
        ConfigError: there is no such shape, or the checkpoint has no routed experts.
    """
    subject: Subject = skeleton(request.kind, request.source, request.dtype)
    layouts = list(subject.found.stacks.values())
    stacks = [layout.num_experts * p.in_features * p.out_features for layout in layouts for p in layout.projections]
    first = layouts[0] if layouts else None
    parameters = list(subject.model.parameters())
    return Sizes(
        layers=len(layouts),
        experts=first.num_experts if first else 0,
        hidden=first.projections[-1].out_features if first else 0,
        intermediate=first.projections[-1].in_features if first else 0,
        top_k=subject.top_k,
        parameters=sum(p.numel() for p in parameters),
        expert_parameters=sum(stacks),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        is_dense=any(layout.sparse_block is not None for layout in layouts),
    )


def unfit(request: Request, sizes: Sizes) -> dict[tuple[int, str], str]:
    """(tokens, peer) -> why it does not fit.

    Raises:
        ConfigError: the weights alone do not fit, or no peer does.
    """
    available = available_bytes(torch.device(request.device))
    if available is None:
        return {}
    if sizes.weight_bytes > available:
        smaller = "a smaller model" if request.kind == "step" else "a smaller --shape"
        advice = f"{smaller} or --dtype bfloat16" if request.dtype == "float32" else smaller
        raise ConfigError(
            f"{request.source} in {request.dtype} needs about {_gb(sizes.weight_bytes)} for its weights alone, "
            f"{_gb(available)} are available on {request.device}; use {advice}"
        )
    needs = {
        (tokens, name): needed_bytes(request, sizes, peer_named(name), tokens)
        for tokens in request.tokens
        for name in request.peers
    }
    if min(needs.values()) > available:
        raise ConfigError(
            f"{request.source} in {request.dtype}: even the lightest of {', '.join(request.peers)} needs about "
            f"{_gb(min(needs.values()))} at {min(request.tokens)} tokens, {_gb(available)} are available on "
            f"{request.device}; use fewer --tokens or a smaller model"
        )
    left = f"{_gb(available)} are available"
    return {key: f"It needs about {_gb(need)}, {left}" for key, need in needs.items() if need > available}


def needed_bytes(request: Request, sizes: Sizes, peer: Peer, tokens: int) -> int:
    """What a step of `peer` holds at its peak, weights included."""
    element = torch.empty(0, dtype=getattr(torch, request.dtype)).element_size()
    layers = max(1, sizes.layers)
    kept_layers = 1 if request.gradient_checkpointing else layers
    layer_stacks = sizes.expert_parameters * element // layers
    # Stock PEFT merges the stacks of each layer, which the backward pass needs again, and makes their dense gradient.
    merged = layer_stacks * (kept_layers + peer.gradient_stacks) if peer.gradient_stacks else 0
    per_token = sizes.experts if sizes.is_dense and peer.is_stock else sizes.top_k or _USUAL_TOP_K
    row = _HIDDEN_ROWS * sizes.hidden + _INNER_ROWS * sizes.intermediate
    activations = tokens * per_token * row * element * kept_layers
    # Factors, their gradients and AdamW's two states in float32, which is what PEFT makes of them.
    factors = layers * sizes.experts * request.rank * (2 * sizes.hidden + 3 * sizes.intermediate) * 4 * 4
    # What is added to trained experts, its gradient and AdamW's two states in float32; and the sum in one layer.
    in_full = int(peer.trained_share * (16 * sizes.expert_parameters + layer_stacks))
    return sizes.weight_bytes + merged + activations + in_full + (factors if peer.adapts_experts else 0)


def _gb(number: int) -> str:
    return f"{number / 1e9:.0f} GB" if number >= 10**10 else f"{number / 1e9:.1f} GB"
