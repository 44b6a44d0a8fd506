"""The low-rank factors of one adapter for one module of experts: of all experts, or of some, with one rank or several.

Legend: E experts of the module, G of them in a class, r its rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.layout import Projection
from trl_moe_ext.kernels.selected import SelectedExperts
from trl_moe_ext.tuners.selection.indices import SelectedIndices


@dataclass(frozen=True)
class RankClass:
    """The experts of a module whose updates have the same rank.

    Attributes:
        rank: r.
        selected: which experts; None for all.
        suffix: of the names of their factors; empty where all adapted experts have one rank.
    """

    rank: int
    selected: SelectedExperts | None = None
    suffix: str = ""

    def experts(self, num_experts: int) -> Sequence[int]:
        """Those of a module with so many, in the order of their factors."""
        return range(num_experts) if self.selected is None else self.selected.experts

    def factors_of(self, projection: Projection) -> str:
        """The name of the factors of a projection."""
        return projection.name + self.suffix


def rank_classes(rank: int, expert_ranks: Mapping[int, int] | None, num_experts: int) -> tuple[RankClass, ...]:
    """The classes of a module, in ascending rank.

    Args:
        rank: of experts without one of their own.
        expert_ranks: the adapted experts -> their ranks; None for all experts with `rank`.
        num_experts: E.

    Raises:
        ConfigError: an expert is named that there is not, or a rank is not one.
    """
    if expert_ranks is None:
        return (RankClass(rank),)
    outside = [expert for expert in expert_ranks if not 0 <= expert < num_experts]
    if outside or not expert_ranks:
        raise ConfigError(f"experts {outside} are chosen of a module with {num_experts}; indices start at 0")
    if min(expert_ranks.values()) < 1:
        raise ConfigError(f"a rank of experts is {min(expert_ranks.values())}; use an integer of at least 1")
    ranks = sorted({*expert_ranks.values()})
    if len(ranks) == 1 and len(expert_ranks) == num_experts:
        return (RankClass(ranks[0]),)
    members = {r: tuple(sorted(e for e, of_it in expert_ranks.items() if of_it == r)) for r in ranks}
    return tuple(
        RankClass(r, SelectedExperts(members[r], num_experts), f"_r{r}" if len(ranks) > 1 else "") for r in ranks
    )


class ExpertFactors(nn.Module):
    """One side (A or B) of an adapter's low-rank factors of a module of experts, a parameter for each projection.

    The parameters carry the names of the stacks they adapt and are ``(E, r, in)`` for A, ``(E, out, r)`` for B. Where
    experts are left out, there are rows for the others only; where ranks differ, a parameter for each rank.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int, int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    @classmethod
    def pair(
        cls, classes: Sequence[RankClass], projections: Sequence[Projection], num_experts: int
    ) -> tuple[ExpertFactors, ExpertFactors]:
        """Both sides, A and B, not initialised."""
        a: dict[str, tuple[int, int, int]] = {}
        b: dict[str, tuple[int, int, int]] = {}
        for each in classes:
            rows = len(each.experts(num_experts))
            for p in projections:
                a[each.factors_of(p)] = (rows, each.rank, p.in_features)
                b[each.factors_of(p)] = (rows, p.out_features, each.rank)
        return cls(a), cls(b)


def indices_of(classes: Sequence[RankClass]) -> SelectedIndices:
    """Which experts the factors of an adapter are of, for its file."""
    return SelectedIndices({f"experts{each.suffix}": each.selected for each in classes if each.selected is not None})


@torch.no_grad()
def initialise(A: ExpertFactors, B: ExpertFactors, how: bool | str) -> None:
    """Initialise each expert's factors as PEFT initialises those of a Linear of the same shape.

    Args:
        how: PEFT's `init_lora_weights`: True (A uniform, B zero), ``gaussian`` (A normal) or False (both random).
    """
    for a in A.parameters():
        if how == "gaussian":
            nn.init.normal_(a, std=1 / a.shape[1])
        else:
            # Kaiming with a = sqrt(5), the default of nn.Linear, is uniform within 1 / sqrt(fan_in).
            nn.init.uniform_(a, -1 / math.sqrt(a.shape[2]), 1 / math.sqrt(a.shape[2]))
    for b in B.parameters():
        if how is False:
            nn.init.uniform_(b, -1 / math.sqrt(b.shape[2]), 1 / math.sqrt(b.shape[2]))
        else:
            nn.init.zeros_(b)


def each_expert(
    classes: Sequence[RankClass], A: ExpertFactors, B: ExpertFactors, projection: Projection, num_experts: int
) -> Iterator[tuple[int, RankClass, Tensor, Tensor]]:
    """Every adapted expert of a projection: its index, its class, and its ``(r, in)`` and ``(out, r)`` factors."""
    for rank_class in classes:
        a = getattr(A, rank_class.factors_of(projection), None)
        if a is None:
            continue
        b = getattr(B, rank_class.factors_of(projection))
        for place, expert in enumerate(rank_class.experts(num_experts)):
            yield expert, rank_class, a[place], b[place]
