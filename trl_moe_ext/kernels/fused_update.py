"""The low-rank updates of one projection for a group of experts, forward and backward, as batched products.

Legend: E experts (those that are selected, where an update is of some only), r rank; a group has G experts and
R = G*m rows, those in excess among them.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from trl_moe_ext.kernels.expert_groups import ExpertGroup
from trl_moe_ext.kernels.fused_parts import PairsOfFactors
from trl_moe_ext.kernels.low_rank import LowRank, Updates


class ProjectionUpdates:
    """All updates of a projection, of which an expert has one or none.

    Attributes:
        number_of: for each expert that of its update, None for none.
    """

    def __init__(self, updates: Updates, num_experts: int) -> None:
        self._updates = [Update(factors) for factors in updates]
        self.number_of: list[int | None] = [None] * num_experts
        for number, factors in enumerate(updates):
            for expert in factors.experts:
                self.number_of[expert] = number

    @property
    def rank(self) -> int:
        """The largest rank; 0 without updates."""
        return max((update.rank for update in self._updates), default=0)

    def of(self, group: ExpertGroup) -> Update | None:
        """The update of a group of experts that have the same one, or none."""
        number = self.number_of[group.experts[0]]
        return None if number is None else self._updates[number]

    def gradients(self, idle: Tensor) -> PairsOfFactors:
        """Those of each update's factors, see `Update.gradients`."""
        return tuple(update.gradients(idle) for update in self._updates)


class Update:
    """``s B A`` of one projection, and the gradients of its factors."""

    def __init__(self, factors: LowRank) -> None:
        self._factors, self.rank = factors, factors.A.shape[1]
        self._slots = None if factors.selected is None else factors.selected.slots(factors.A.device)

    @cached_property
    def _gradients(self) -> tuple[Tensor, Tensor]:
        """In memory that is not written yet; the forward pass never asks for it."""
        return torch.empty_like(self._factors.A), torch.empty_like(self._factors.B)

    def part_of(self, kept: Tensor, group: ExpertGroup) -> Tensor:
        """``(R, r)``: where u of the group is in what is kept of all groups for the largest rank."""
        return kept[group.rows, : self.rank]

    def project(self, x: Tensor, group: ExpertGroup) -> Tensor:
        """``s A (m.x)``: ``(R, in)`` to ``(R, r)``."""
        A = self._of(self._factors.A, group)
        return torch.bmm(self._masked(x, group), A.mT).mul_(self._factors.scaling).flatten(0, 1)

    def expand(self, y: Tensor, u: Tensor, group: ExpertGroup) -> None:
        """Add ``B u`` to y: ``(R, out)`` and ``(R, r)``."""
        B = self._of(self._factors.B, group)
        _add_products(group.by_expert(y), group.by_expert(u.to(group.small)), B.mT)

    def backward(
        self, d_x: Tensor | None, grad: Tensor, x: Tensor, u: Tensor, group: ExpertGroup, weight: Tensor | None
    ) -> None:
        """Add to the gradient of x, and write those of the factors.

        Args:
            d_x: ``(R, in)``; None if it is not needed.
            grad: ``(R, out)``, the gradient of the projection's output; before its weight if there is one.
            x: ``(R, in)``, what the projection was applied to.
            u: ``(R, r)``, what `project` made of it.
            group: the experts and their rows.
            weight: ``(R, 1)``, left out of grad; the gradients of the factors have it, that of x has not.
        """
        grad, u = group.by_expert(grad.to(group.small)), group.by_expert(u.to(group.small))
        v = torch.bmm(grad, self._of(self._factors.B, group)).mul_(self._factors.scaling)
        if d_x is not None:
            A = self._of(self._factors.A, group)
            if self._factors.seed is None:
                _add_products(group.by_expert(d_x), v, A)
            else:
                d_x += self._factors.dropped(torch.bmm(v, A).flatten(0, 1), group.pairs).to(d_x.dtype)
        if weight is not None:
            w = group.by_expert(weight.to(group.small))
            u, v = u * w, v * w
        (d_A, d_B), places = self._gradients, self._places(group.chosen)
        d_A.index_copy_(0, places, torch.bmm(v.mT, self._masked(x, group)).to(d_A.dtype))
        d_B.index_copy_(0, places, torch.bmm(grad.mT, u).to(d_B.dtype))

    def gradients(self, idle: Tensor) -> tuple[Tensor, Tensor]:
        """``(E, r, in)`` and ``(E, out, r)`` in the factors' dtype, after `backward` of all groups.

        Args:
            idle: indices of the experts that no group had; their gradients are zero.
        """
        (d_A, d_B), places = self._gradients, self._places(idle)
        places = places[places < len(d_A)]  # the others have no factors
        return d_A.index_fill_(0, places, 0), d_B.index_fill_(0, places, 0)

    def _places(self, experts: Tensor) -> Tensor:
        """Where in the factors those of these experts are; E where an expert has none."""
        return experts if self._slots is None else self._slots[experts]

    def _of(self, factor: Tensor, group: ExpertGroup) -> Tensor:
        return factor.index_select(0, self._places(group.chosen)).to(group.small)

    def _masked(self, x: Tensor, group: ExpertGroup) -> Tensor:
        """What dropout leaves of the rows, ``(G, m, in)``."""
        return group.by_expert(self._factors.dropped(x.to(group.small), group.pairs))


def _add_products(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` for every expert."""
    if out.dtype == left.dtype:
        torch.baddbmm(out, left, right, out=out)
    else:
        out += torch.bmm(left, right).to(out.dtype)  # adding in one dtype is faster
