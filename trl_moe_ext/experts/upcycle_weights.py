"""The weights of a mixture made from a dense model: copies of each MLP, a new router, and a silent shared expert.

The routing weights of a token sum to one, so equal experts give what the dense MLP gave, whichever of them the router
chooses. Attention, norms and embeddings stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trl_moe_ext.experts.upcycle_options import UpcycleOptions

__all__ = ["mixture_of"]


@torch.no_grad()
def mixture_of(dense: Any, config: Any, options: UpcycleOptions) -> Any:
    """A model to be saved (its buffers are not filled). It takes the MLPs of `dense` away, and shares the rest."""
    generator = torch.Generator().manual_seed(options.seed)
    # Drawn before any noise, so that the routers of a seed are the same with and without it.
    routers = _normal((config.num_hidden_layers, options.num_experts, config.hidden_size), config, generator)
    weights: dict[str, Tensor] = {}
    for index, layer in enumerate(dense.model.layers):
        mlp, layer.mlp = layer.mlp, None
        parts = {"gate.weight": routers[index]} | _experts(mlp, options, generator)
        if width := getattr(config, "shared_expert_intermediate_size", 0):
            parts |= _silent_shared_expert(width, config, generator)
        weights |= {f"model.layers.{index}.mlp.{name}": part.to(dense.dtype) for name, part in parts.items()}
    with torch.device("meta"):
        mixture = AutoModelForCausalLM.from_config(config)
    # Strict: every weight of the mixture is given, and none of the dense model is left over.
    mixture.load_state_dict(weights | dense.state_dict(), strict=True, assign=True)
    mixture.tie_weights()
    return mixture


def _experts(mlp: Any, options: UpcycleOptions, generator: torch.Generator) -> dict[str, Tensor]:
    """`gate_up_proj` `(E, 2I, H)` and `down_proj` `(E, H, I)` out of one dense MLP."""

    def copies(weight: Tensor) -> Tensor:
        stack = weight.repeat(options.num_experts, 1, 1)
        if options.noise:
            scale = options.noise * weight.float().std()
            for expert in stack:
                expert.add_(scale * torch.randn(expert.shape, generator=generator))
        return stack

    gate_up = torch.cat([copies(mlp.gate_proj.weight), copies(mlp.up_proj.weight)], dim=1)
    return {"experts.gate_up_proj": gate_up, "experts.down_proj": copies(mlp.down_proj.weight)}


def _silent_shared_expert(width: int, config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """A shared expert that adds exactly zero. Only its last projection is zero, so that it can learn."""
    return {
        "shared_expert.gate_proj.weight": _normal((width, config.hidden_size), config, generator),
        "shared_expert.up_proj.weight": _normal((width, config.hidden_size), config, generator),
        "shared_expert.down_proj.weight": torch.zeros(config.hidden_size, width),
        "shared_expert_gate.weight": torch.zeros(1, config.hidden_size),
    }


def _normal(shape: tuple[int, ...], config: Any, generator: torch.Generator) -> Tensor:
    """New weights as transformers draws them for this architecture."""
    return torch.randn(shape, generator=generator) * float(config.initializer_range)
