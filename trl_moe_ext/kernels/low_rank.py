"""A low-rank update of one stack of expert weights, and which updates can be taken together.

Legend: E experts, G of them selected, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from torch import Tensor

from trl_moe_ext.kernels.dropout import drop
from trl_moe_ext.kernels.selected import SelectedExperts


class LowRank(NamedTuple):
    """One adapter's update ``scaling * B @ A`` of one stack of expert weights.

    Attributes:
        A: ``(E, r, in)``, any floating dtype; products run in the dtype of the rows, gradients come back in this one.
            With `selected` it is ``(G, r, in)``, for those experts only; all others have no update.
        B: ``(E, out, r)``, or ``(G, out, r)``.
        scaling: s.
        dropout: probability p of dropping an input feature of the low-rank branch.
        seed: 0-d int32 from `dropout.draw_seed`; None switches dropout off.
        first_pair: number of the first (token, slot) pair, where a call has a part of the tokens: masks go on.
        selected: the G experts that the factors are of, in their order; None for all.
    """

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None
    first_pair: int = 0
    selected: SelectedExperts | None = None

    @property
    def experts(self) -> Sequence[int]:
        """Those that the factors are of, in their order."""
        return range(len(self.A)) if self.selected is None else self.selected.experts

    def dropped(self, x: Tensor, pairs: Tensor) -> Tensor:
        """``(n, in)`` rows of the (token, slot) pairs ``(n,)``: what dropout leaves of them."""
        return x if self.seed is None else drop(x, self.seed, pairs + self.first_pair, self.dropout)


Updates = tuple[LowRank, ...]


def are_apart(updates: Sequence[LowRank]) -> bool:
    """Whether no expert has two of these updates of a projection, and the same of its inputs is dropped for all."""
    return all(_apart(one, other) for one, other in combinations(updates, 2))


def sets_apart(updates: Updates) -> list[Updates]:
    """The updates in sets that `are_apart`, each in the first that has room; at least one, which may be empty."""
    sets: list[Updates] = [()]
    for update in updates:
        for number, members in enumerate(sets):
            if are_apart((*members, update)):
                sets[number] = (*members, update)
                break
        else:
            sets.append((update,))
    return sets


def _apart(one: LowRank, other: LowRank) -> bool:
    if one.selected is None or other.selected is None or not one.selected.is_apart_from(other.selected):
        return False
    return one.seed is other.seed and (one.seed is None or one.dropout == other.dropout)
