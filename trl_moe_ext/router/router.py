"""What is known of one router of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trl_moe_ext.router.places import running

__all__ = ["Router"]


@dataclass(frozen=True)
class Router:
    """One router of a model.

    Attributes:
        name: of its module in the model without adapters, such as ``model.layers.3.mlp.gate``.
        module: what the block calls there, and what is therefore observed: the router itself, or the wrapper that an
            adapter put in its place.
        num_experts: E, the width of its logits. It counts identity experts, and a class that stands for no expert.
        top_k: K, how many experts it picks for a token.
        experts: name of the module of experts that it routes to; the first, if it routes to several.
        all_experts: names of all modules that it routes to, `experts` first. JetMoe keeps the two projections of its
            experts in two modules.
        label: short and unique in the model: the number of the layer, and more where that is not unique.
        logits_at: position of the logits in its output, as transformers declares it; None if it does not.
        experts_module: what the block calls in the place of the experts.
        skip_class: the logit that stands for no expert, or None.
        identity_experts: how many experts return their token unchanged; they come after those with weights.
    """

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    experts: str
    label: str
    logits_at: int | None = None
    experts_module: nn.Module | None = None
    skip_class: int | None = None
    identity_experts: int = 0
    all_experts: tuple[str, ...] = ()

    @property
    def num_with_weights(self) -> int:
        """How many experts have weights; their indices come before those of all others."""
        return self.num_experts - self.identity_experts - (self.skip_class is not None)

    @property
    def own(self) -> nn.Module:
        """The family's own module that runs now, inside the wrappers of an adapter: it holds weights and biases."""
        return running(self.module)
