"""The low-rank factors of one module of experts, whoever attached them, expert by expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts


@dataclass(frozen=True)
class Factors:
    """The parameters of one projection's update and how they look for each expert, ``(E, r, in)`` and ``(E, out, r)``.

    Attributes:
        experts: those that have an update, in the order of the rows.
        A, B: as they are stored.
        scaling: of their product.
        expert_a, expert_b: from the stored form of A and B to that, a view, for values and gradients alike.
    """

    experts: Sequence[int]
    A: Tensor
    B: Tensor
    scaling: float
    expert_a: Callable[[Tensor], Tensor]
    expert_b: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def randomise(self, generator: torch.Generator) -> None:
        """Values of the size that they have in training; B is not zero, so that A has a gradient."""
        for stored, view in ((self.A, self.expert_a), (self.B, self.expert_b)):
            seen = view(stored)
            values = torch.randn(seen.shape, generator=generator, device="cpu") * seen.shape[2] ** -0.5
            seen.copy_(values)


def factors_of(model: nn.Module, layout: ExpertsLayout) -> dict[str, Factors]:
    """Projection name -> its factors in an adapted model with one module of experts."""
    found = dict(_of_moe_lora(model)) | dict(_of_peft(model, layout.num_experts))
    return {p.name: found[p.parameter] for p in layout.projections if p.parameter in found}


def _of_moe_lora(model: nn.Module) -> Iterator[tuple[str, Factors]]:
    for module in model.modules():
        if isinstance(module, MoeLoraExperts):
            for projection in module.layout.projections:
                (update,) = module.updates("default", projection)
                yield (
                    projection.parameter,
                    Factors(update.experts, update.A, update.B, update.scaling, _as_it_is, _as_it_is),
                )


def _of_peft(model: nn.Module, experts: int) -> Iterator[tuple[str, Factors]]:
    """PEFT keeps all experts' factors in two matrices: A ``(E * r, in)``, B ``(out, r * E)`` with the expert last."""

    def expert_a(stored: Tensor) -> Tensor:
        return stored.view(experts, -1, stored.shape[1])

    def expert_b(stored: Tensor) -> Tensor:
        return stored.view(stored.shape[0], -1, experts).permute(2, 0, 1)

    for module in model.modules():
        if isinstance(module, ParamWrapper):
            A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
            yield module.parameter_name, Factors(range(experts), A, B, module.scaling["default"], expert_a, expert_b)


def _as_it_is(stored: Tensor) -> Tensor:
    return stored
