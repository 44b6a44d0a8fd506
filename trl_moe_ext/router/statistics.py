"""What a router did with the tokens that counted, as sums: they add up over micro-batches, steps and processes.

Nothing here waits for the device. Legend: T tokens of a forward, K top_k, E experts of the router.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor

from trl_moe_ext.router.tokens import count_choices, is_expert, only_kept

if TYPE_CHECKING:
    from trl_moe_ext.router.trace import Routing

__all__ = ["DriftStatistics", "LayerStatistics", "added"]

Statistics = TypeVar("Statistics", bound="Sums")


@dataclass
class Sums:
    """Tensors that add up over tokens, field by field, in the dtype of `as_sum`.

    Attributes:
        tokens: ``()``, how many tokens they are of, without padding.
    """

    tokens: Tensor

    def __add__(self, other: Self) -> Self:
        added = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return replace(self, **added)

    def as_vector(self) -> Tensor:
        """All fields one after the other in one dimension: a sum over processes is one call."""
        return torch.cat([as_sum(getattr(self, field.name)).reshape(-1) for field in fields(self)])


@dataclass
class LayerStatistics(Sums):
    """What one router did.

    Attributes:
        counts: ``(E,)``, tokens that chose each expert.
        probabilities: ``(E,)``, sum over the tokens of the probability of each expert.
        entropy: ``()``, sum over the tokens of the entropy of their probabilities, each divided by log E.
        mass: ``()``, sum over the tokens of the probability of their chosen experts.
    """

    counts: Tensor
    probabilities: Tensor
    entropy: Tensor
    mass: Tensor

    @classmethod
    def of(cls, routing: Routing) -> LayerStatistics:
        """The statistics of one forward, without a graph."""
        # Not by no_grad around it all, in which the routing would cache its probabilities without a graph.
        probabilities = only_kept(routing.probabilities.detach(), routing.kept)
        num_experts = probabilities.shape[-1]
        chosen = is_expert(routing.top_k_index, num_experts)
        selected = probabilities.gather(1, torch.where(chosen, routing.top_k_index, 0))
        return cls(
            tokens=as_sum(count_tokens(routing)),
            counts=as_sum(count_choices(routing.top_k_index, num_experts, routing.kept)),
            probabilities=as_sum(probabilities.sum(0)),
            entropy=as_sum(_entropy(probabilities)),
            mass=as_sum(torch.where(chosen, selected, 0).sum()),
        )

    @classmethod
    def from_vector(cls, vector: Tensor) -> LayerStatistics:
        """The inverse of `as_vector`."""
        num_experts = (vector.numel() - 3) // 2
        tokens, counts, probabilities, entropy, mass = torch.split(vector, [1, num_experts, num_experts, 1, 1])
        return cls(tokens.squeeze(0), counts, probabilities, entropy.squeeze(0), mass.squeeze(0))


@dataclass
class DriftStatistics(Sums):
    """How far the routing of one router is from that of the model without its adapters; made by `metrics.drift`.

    Attributes:
        kl: ``()``, sum over the tokens of KL(base || now), in nats.
        chosen: ``()``, choices of the base model: tokens times K.
        still_chosen: ``()``, those of them that are chosen now as well.
    """

    kl: Tensor
    chosen: Tensor
    still_chosen: Tensor

    @classmethod
    def from_vector(cls, vector: Tensor) -> DriftStatistics:
        """The inverse of `as_vector`."""
        return cls(*vector.unbind())


def _entropy(probabilities: Tensor) -> Tensor:
    """``()``: the sum over the rows of H(p) / log E."""
    # Less than half the time of `torch.special.entr` on a CPU.
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    # The entropy of a choice among one is zero, whatever it is divided by.
    return -(probabilities * logs).sum() / (math.log(probabilities.shape[-1]) or 1.0)


def added(to: Mapping[str, Statistics], more: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """The sums of two sets of statistics by the labels of their routers; one may lack what the other has."""
    return {**to, **{label: to[label] + layer if label in to else layer for label, layer in more.items()}}


def count_tokens(routing: Routing) -> Tensor:
    """``()``, int64: the tokens of a forward that count, on its device."""
    if routing.kept is not None:
        return routing.kept.sum()
    index = routing.top_k_index
    return torch.full((), index.shape[0], dtype=torch.int64, device=index.device)


def as_sum(value: Tensor) -> Tensor:
    """``value`` as float64, in which counts stay exact however long they add up; Apple's devices have float32 only."""
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64)
