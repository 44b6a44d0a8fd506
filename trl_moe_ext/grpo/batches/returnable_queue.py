"""A queue of samples that takes back what does not fit into a micro-batch, and looks at its age again."""

from __future__ import annotations

from collections import deque

from trl_moe_ext.grpo.rollout.sample_queue import SampleQueue
from trl_moe_ext.grpo.sample import MoeRolloutSample

__all__ = ["ReturnableQueue"]


class ReturnableQueue:
    """What TRL's dataset uses of a queue, in front of a `SampleQueue`.

    A group that comes back untouched goes into the queue again, which drops it if it has become too old meanwhile. Of
    one that was begun the rest is kept: its other samples are trained on already.

    Args:
        queue: hands out the samples of a group side by side, all of them at once.
        group_size: samples of a group.
    """

    def __init__(self, queue: SampleQueue, group_size: int) -> None:
        self._queue, self._group_size = queue, group_size
        self._group: list[MoeRolloutSample] = []
        self._left: deque[MoeRolloutSample] = deque()

    def get(self, timeout: float | None = None) -> MoeRolloutSample:
        """The next sample.

        Raises:
            queue.Empty: there is none within `timeout` seconds.
            StopRequested: there is none, and a stop was asked for.
        """
        if not self._left:
            first = self._queue.get(timeout)
            self._group = [first, *(self._queue.get(0) for _ in range(self._group_size - 1))]
            self._left.extend(self._group)
        return self._left.popleft()

    def put_back(self, sample: MoeRolloutSample) -> None:
        """Undo the last `get`, which gave this sample."""
        self._left.appendleft(sample)
        if len(self._left) == self._group_size:
            self._left.clear()
            self._queue.put_group(self._group)

    def qsize(self) -> int:
        """Samples that are there."""
        return self._queue.qsize() + len(self._left)
