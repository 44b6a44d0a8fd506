"""A tiny mixture of experts, and profiles that are made up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trl_moe_ext.profiles.profile import ExpertProfile, LayerUse


def layer_use(shares: Sequence[float], label: str = "0", gate_score: Sequence[float] | None = None) -> LayerUse:
    return LayerUse(
        label=label,
        router=f"model.layers.{label}.mlp.gate",
        experts=(f"model.layers.{label}.mlp.experts",),
        top_k=2,
        tokens=1000,
        token_share=tuple(shares),
        gate_score=tuple(shares if gate_score is None else gate_score),
        fingerprint=(0.5, -1.25),
    )


def profile_of(*layers: Sequence[float]) -> ExpertProfile:
    """A profile with the given token shares of each layer."""
    uses = tuple(layer_use(shares, str(number)) for number, shares in enumerate(layers))
    return ExpertProfile("some/model", "SomeForCausalLM", "some data", 1000, uses, {"x.experts": "a reason"})


def set_routers(model: nn.Module, scale: float) -> None:
    """Multiply the weights of all routers."""
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.mul_(scale)
