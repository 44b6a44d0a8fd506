"""When a backend that has failed may be started again: later after each failure in a row, and at last never."""

from __future__ import annotations

import logging
import time

from trl_moe_ext.grpo.backends.errors import BackendError
from trl_moe_ext.grpo.rollout.errors import RolloutError

__all__ = ["BackOff"]

logger = logging.getLogger(__name__)

MAX_BACK_OFF_S = 30.0


class BackOff:
    """Counts failures in a row.

    Args:
        max_restarts: that many of them are allowed.
    """

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._failures = 0
        self._not_before = 0.0

    def failed(self, error: BackendError) -> None:
        """Count a failure; the next start has its time in 1, 2, 4, ... and no more than 30 seconds.

        Raises:
            RolloutError: there were more than are allowed.
        """
        self._failures += 1
        if self._failures > self._max_restarts:
            raise RolloutError(
                f"the rollout backend failed {self._failures} times in a row without a completion in between, at last "
                f"with {type(error).__name__}: {error}. max_rollout_restarts={self._max_restarts} allows no more"
            ) from error
        delay = min(2.0 ** (self._failures - 1), MAX_BACK_OFF_S)
        self._not_before = time.monotonic() + delay
        logger.warning(
            "the rollout backend failed and is started again in %g s (%d of max_rollout_restarts=%d): %s: %s",
            delay,
            self._failures,
            self._max_restarts,
            type(error).__name__,
            error,
        )

    def succeeded(self) -> None:
        """What comes next is the first failure again."""
        self._failures = 0

    def seconds_left(self) -> float:
        """How long until the next start; 0 if its time has come."""
        return max(0.0, self._not_before - time.monotonic())
