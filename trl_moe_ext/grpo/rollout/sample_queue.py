"""The samples between the conductor, which puts whole groups in, and the trainer, which takes sample after sample."""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from trl_moe_ext.grpo.sample import MoeRolloutSample
from trl_moe_ext.grpo.timeline import TRAINER, Timeline

__all__ = ["SampleQueue", "StopRequested"]


class StopRequested(BaseException):
    """Training is to end although it waits for samples; not an Exception, so that nothing on its way catches it."""


class SampleQueue:
    """What TRL's trainer uses of a queue, with the samples of a group side by side.

    Args:
        max_staleness: a group with a sample that is further behind the trainer's version is not handed out.
        give_back: told the id of such a group, to be generated again.
        push_metrics: takes ``{"lag/k": (1 or 0, 1)}`` of each sample that is handed out.
        timeline: of the trainer: ``waiting`` for a sample, ``training`` with it.
        wake: called when there is room, or when the trainer begins to wait.
    """

    def __init__(
        self,
        *,
        max_staleness: int,
        give_back: Callable[[int], None],
        push_metrics: Callable[[dict[str, float | tuple[float, float]]], None],
        timeline: Timeline,
        wake: Callable[[], None],
    ) -> None:
        self._max_staleness, self._give_back, self._push_metrics = max_staleness, give_back, push_metrics
        self._timeline, self._wake = timeline, wake
        # Re-entrant: a signal handler that asks for a stop may have interrupted the very thread that holds it.
        self._changed = threading.Condition(threading.RLock())
        # The oldest version first, and of each the lowest id: what was begun first has the least time left.
        self._groups: list[tuple[int, int, list[MoeRolloutSample]]] = []
        self._current: deque[MoeRolloutSample] = deque()
        self._current_lag = 0
        self._waiting = self._failed = self._stop_requested = False
        self.trainer_version = 0
        self.dropped_groups = 0

    def put_group(self, samples: Sequence[MoeRolloutSample]) -> None:
        """Put all samples of a group in; never blocks: the conductor begins no more groups than there is room for."""
        with self._changed:
            oldest = min(sample.model_version for sample in samples)
            heapq.heappush(self._groups, (oldest, samples[0].group_id, list(samples)))
            self._changed.notify()

    def get(self, timeout: float | None = None) -> MoeRolloutSample:
        """The next sample; all samples of its group come before those of another.

        Raises:
            queue.Empty: there is none within `timeout` seconds, or the conductor has given up: see `check_health`.
            StopRequested: there is none, and `request_stop` was called.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            try:
                while (sample := self._next()) is None:
                    if self._stop_requested:
                        raise StopRequested
                    left = None if deadline is None else deadline - time.monotonic()
                    if self._failed or (left is not None and left <= 0):
                        raise queue.Empty
                    self._timeline.mark(TRAINER, "waiting")
                    self._waiting = True
                    self._wake()
                    self._changed.wait(left)
            finally:
                self._waiting = False
            lag = self._current_lag
        self._timeline.mark(TRAINER, "training")
        self._push_metrics({f"lag/{k}": (float(k == lag), 1.0) for k in range(self._max_staleness + 1)})
        return sample

    def qsize(self) -> int:
        """Samples that are there, stale ones included."""
        with self._changed:
            return len(self._current) + sum(len(group) for _, _, group in self._groups)

    @property
    def waiting(self) -> bool:
        """Whether the trainer waits for a sample."""
        return self._waiting

    def request_stop(self) -> None:
        """From now on `get` raises StopRequested instead of waiting; from any thread, or from a signal handler."""
        self._stop_requested = True
        self._notify()

    def fail(self) -> None:
        """No more samples will come: `get` hands out those that are there, and then raises at once."""
        self._failed = True
        self._notify()

    def reopen(self) -> None:
        """Forget all samples, a failure and a request to stop."""
        with self._changed:
            self._groups.clear()
            self._current.clear()
            self._failed = self._stop_requested = False

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _next(self) -> MoeRolloutSample | None:
        while not self._current:
            if not self._groups:
                return None
            oldest, group_id, group = heapq.heappop(self._groups)
            lag = self.trainer_version - oldest
            if lag > self._max_staleness:
                self.dropped_groups += 1
                self._give_back(group_id)
            else:
                self._current, self._current_lag = deque(group), max(lag, 0)
            self._wake()
        return self._current.popleft()
