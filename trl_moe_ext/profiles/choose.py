"""From how much experts are used to which of them are trained, and with which rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["by_coverage", "by_number", "ranks_by_share"]


def by_coverage(shares: Sequence[float], coverage: float) -> tuple[int, ...]:
    """The fewest experts whose shares add up to `coverage`, in ascending order (ESFT, arXiv 2407.01906, eq. 7).

    Args:
        shares: ``(E,)``, which sum to one.
        coverage: above 0, at most 1; at 1 experts without a share are left out.
    """
    chosen: list[int] = []
    covered = 0.0
    for expert in _by_use(shares):
        # Sums of floats may end a rounding error below one.
        if chosen and (covered >= coverage - 1e-9 or not shares[expert]):
            break
        chosen.append(expert)
        covered += shares[expert]
    return tuple(sorted(chosen))


def by_number(shares: Sequence[float], number: int) -> tuple[int, ...]:
    """The `number` most used experts, all if there are fewer, in ascending order."""
    return tuple(sorted(_by_use(shares)[:number]))


def ranks_by_share(shares: Sequence[float], experts: Sequence[int], rank: int) -> dict[int, int]:
    """A rank for each of `experts` that grows with its share, within the budget of `rank` for each.

    Ranks are ``rank`` times or divided by a power of two, from a quarter to four times, so that few different ones
    share a product. All start with the least; then the expert with the largest share for each unit of its rank gets
    the next rank, as long as one fits into the budget. So an expert never has less rank than one with a smaller share,
    and equal shares give equal ranks where the budget allows it.

    Args:
        shares: ``(E,)``.
        experts: those that are trained.
        rank: their mean rank, at least 1.

    Returns:
        Expert -> rank, at least 1. The ranks add up to ``rank * len(experts)`` at most.
    """
    steps = sorted({max(1, rank // 4), max(1, rank // 2), rank, 2 * rank, 4 * rank})
    larger = dict(pairwise(steps))
    ranks = dict.fromkeys(experts, steps[0])
    left = (rank - steps[0]) * len(ranks)
    while fitting := [e for e, r in ranks.items() if r in larger and larger[r] - r <= left]:
        expert = max(fitting, key=lambda e: (shares[e] / ranks[e], -e))
        left -= larger[ranks[expert]] - ranks[expert]
        ranks[expert] = larger[ranks[expert]]
    return ranks


def _by_use(shares: Sequence[float]) -> list[int]:
    """Experts from the most to the least used; of equals the lower index first."""
    return sorted(range(len(shares)), key=lambda expert: (-shares[expert], expert))
