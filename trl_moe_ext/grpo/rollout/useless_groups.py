"""Groups that teach nothing: which of them are left out, and when there is no hope that any will teach."""

from __future__ import annotations

import logging

from trl_moe_ext.grpo.rewards.advantages import GroupScores
from trl_moe_ext.grpo.rollout.errors import RolloutError

__all__ = ["UselessGroups"]

logger = logging.getLogger(__name__)


class UselessGroups:
    """Looks at every group that has been scored, in order.

    Args:
        limit: groups in a row without an advantage that are left out before one is handed on; also, from the start
            of a run, groups without a reward after which it is given up.
        skip: False to leave none out.

    Attributes:
        total: groups without an advantage so far.
    """

    def __init__(self, limit: int, *, skip: bool) -> None:
        self._limit, self._skip = limit, skip
        self._equal = self._unscored = 0
        self._any_scored = self._warned = False
        self.total = 0

    def leaves_out(self, scores: GroupScores, first_loss: tuple[str, BaseException | None] | None) -> bool:
        """Whether the group is left out.

        Args:
            first_loss: what became of the first reward that was lost, in words, and what was raised.

        Raises:
            RolloutError: no completion at all has had a reward, of `limit` groups.
        """
        self._any_scored |= scores.scored
        if scores.teaches:
            self._equal = self._unscored = 0
            return False
        self.total += 1
        self._equal += scores.scored
        self._unscored += not scores.scored
        if not self._any_scored and self._unscored >= self._limit:
            what, error = first_loss or ("the weighted sums of rewards are no finite numbers", None)
            raise RolloutError(
                f"no completion of the first {self._unscored} groups has a reward, so that there is nothing to learn "
                f"from. First of all, {what}. Mend that, and start again"
            ) from error
        self._warn()
        return self._skip and self._equal + self._unscored <= self._limit

    def _warn(self) -> None:
        if not self._skip or self._warned or self._equal + self._unscored <= self._limit:
            return
        self._warned = True
        logger.warning(
            "of %d groups in a row, %d had the same reward for all of their completions, and %d no reward at all: "
            "until that changes such groups are handed to the trainer, which learns nothing from them. Look at the "
            "reward functions, or raise num_generations or temperature",
            self._equal + self._unscored,
            self._equal,
            self._unscored,
        )
