"""From the rewards of a group to the advantages of its completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["GroupScores", "score_group"]

# What TRL adds to the standard deviation.
EPSILON = 1e-8
# The squares of greater rewards, of which the standard deviation is made, would be no numbers any more.
GREATEST = 1e150


@dataclass(frozen=True)
class GroupScores:
    """What the rewards of a group come to.

    Attributes:
        rewards: ``(n,)`` the weighted sums over functions; NaN where no function gave one, or the sum is beyond 1e150.
        advantages: ``(n,)``, 0 where there is no reward.
        std: population standard deviation of the rewards that are there; NaN without any.
        by_function: ``(F, n)``, NaN where a function gave none.
    """

    rewards: NDArray[np.float64]
    advantages: NDArray[np.float64]
    std: float
    by_function: NDArray[np.float64]

    @property
    def scored(self) -> bool:
        """Whether any completion has a reward."""
        return not bool(np.isnan(self.rewards).all())

    @property
    def teaches(self) -> bool:
        """Whether any advantage differs from 0."""
        return bool(self.advantages.any())


def score_group(by_function: NDArray[np.float64], weights: Sequence[float] | None = None) -> GroupScores:
    """Rewards and advantages as TRL's workers compute them: ``(r - mean) / (std + 1e-8)`` over those that have one.

    Args:
        by_function: ``(F, n)`` rewards of F functions for n completions, NaN where there is none.
        weights: F weights; 1 by default.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = by_function * np.asarray([1.0] * len(by_function) if weights is None else weights)[:, None]
        sums = np.nansum(weighted, axis=0)
    scored = ~np.isnan(by_function).all(axis=0) & (np.abs(sums) <= GREATEST)
    rewards = np.where(scored, sums, np.nan)
    advantages = np.zeros_like(rewards)
    there = rewards[scored]
    std = float(there.std()) if there.size else float("nan")
    # Equal rewards have no advantage at all; their mean in floating point may differ from each by a last bit.
    if there.size and there.max() > there.min():
        advantages[scored] = (there - there.mean()) / (std + EPSILON)
    elif there.size:
        std = 0.0
    return GroupScores(rewards, advantages, std, by_function)
