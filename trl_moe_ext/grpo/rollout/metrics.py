"""What is logged of generation and rewards: collected in the conductor's thread, drained by TRL when it logs."""

from __future__ import annotations

import logging
import queue
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trl_moe_ext.grpo.timeline import GENERATOR, TRAINER, Timeline

__all__ = ["MetricsQueue", "RolloutMetrics"]

logger = logging.getLogger(__name__)

Metrics = dict[str, float | tuple[float, float]]

PUSH_EVERY_S = 0.5


class MetricsQueue(queue.Queue[Metrics]):
    """What TRL drains; bounded, for a run that never logs."""

    def __init__(self, maxsize: int = 100_000) -> None:
        super().__init__(maxsize)
        self._warned = False

    def push(self, metrics: Metrics) -> None:
        """Never blocks: what nobody drains is left out."""
        try:
            self.put_nowait(metrics)
        except queue.Full:
            if not self._warned:
                self._warned = True
                logger.warning("nobody logs the metrics of the rollouts: further ones are left out")


class RolloutMetrics:
    """Sums and shares since the last push. All but the queue is for one thread.

    Args:
        max_completion_length: a completion of that many tokens that does not end with `eos_token_id` was cut short.
    """

    def __init__(self, timeline: Timeline, *, max_completion_length: int, eos_token_id: int | None) -> None:
        self.queue = MetricsQueue()
        self._timeline, self._limit, self._eos = timeline, max_completion_length, eos_token_id
        self._pushed_at = time.monotonic()
        self._tokens = 0
        self._totals: Counter[str] = Counter()
        self._seconds: dict[str, dict[str, float]] = {GENERATOR: {}, TRAINER: {}}

    def completion(self, token_ids: Sequence[int]) -> None:
        """A completion is finished."""
        self._tokens += len(token_ids)
        clipped = len(token_ids) >= self._limit and token_ids[-1] != self._eos
        self.queue.push(
            {
                "completions/mean_length": (float(len(token_ids)), 1.0),
                "completions/clipped_frac": (float(clipped), 1.0),
            }
        )

    def scored(self, rewards: NDArray[np.float64]) -> None:
        """A group is scored, whether it is trained on or left out; NaN where there is no reward."""
        there = rewards[~np.isnan(rewards)]
        if there.size:
            self.queue.push({"rollout/reward": (float(there.sum()), float(there.size))})

    def push(self, *, queue_size: int, in_flight: int, totals: Counter[str]) -> None:
        """Push the state of things, unless that was done a moment ago.

        Args:
            totals: of the whole run, by the name of the metric; what is pushed is how much they have grown.
        """
        now = time.monotonic()
        elapsed = now - self._pushed_at
        if elapsed < PUSH_EVERY_S:
            return
        metrics: Metrics = {
            "rollout/queue_size": float(queue_size),
            "rollout/inflight": float(in_flight),
            "rollout/generated_tok_s": (float(self._tokens), elapsed),
            "generator/idle_frac": self._share(GENERATOR, "idle"),
            "trainer/wait_frac": self._share(TRAINER, "waiting"),
            **{name: float(total - self._totals[name]) for name, total in totals.items()},
        }
        self._pushed_at, self._tokens, self._totals = now, 0, Counter(totals)
        self.queue.push(metrics)

    def _share(self, lane: str, state: str) -> tuple[float, float]:
        """Seconds of the lane in that state, and in any, since the last push."""
        before, now = self._seconds[lane], self._timeline.seconds(lane)
        self._seconds[lane] = now
        return now.get(state, 0.0) - before.get(state, 0.0), sum(now.values()) - sum(before.values())
