"""Who did what when, and who waited for whom: states of the trainer, the generator and the rewards over a run."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass

__all__ = ["GENERATOR", "REWARDS", "TRAINER", "Span", "Timeline"]

TRAINER, GENERATOR, REWARDS = "trainer", "generator", "rewards"


@dataclass(frozen=True)
class Span:
    """One state of one lane; seconds since the timeline began."""

    lane: str
    state: str
    start: float
    end: float


class Timeline:
    """States by lane, marked from any thread.

    The trainer is ``training``, ``waiting`` (for samples) or in a ``sync``; the generator is ``generating``, ``idle``,
    ``loading`` an adapter or ``restarting``; the rewards are ``scoring`` or ``idle``.

    Args:
        max_spans: the oldest spans of a longer run are dropped; the seconds of each state are not.
    """

    def __init__(self, max_spans: int = 20_000) -> None:
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._max_spans = max_spans
        self._open: dict[str, tuple[str, float]] = {}
        self._spans: list[Span] = []
        self._seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def mark(self, lane: str, state: str) -> None:
        """From now on `lane` is in `state`; marking the same state again does nothing."""
        now = time.monotonic() - self._began
        with self._lock:
            if lane in self._open:
                if self._open[lane][0] == state:
                    return
                self._close(lane, now)
            self._open[lane] = state, now

    def spans(self) -> list[Span]:
        """All spans that are kept, the open ones up to now."""
        now = time.monotonic() - self._began
        with self._lock:
            return self._spans + [Span(lane, state, start, now) for lane, (state, start) in self._open.items()]

    def seconds(self, lane: str) -> dict[str, float]:
        """State -> seconds that `lane` has spent in it, up to now."""
        now = time.monotonic() - self._began
        with self._lock:
            found = dict(self._seconds[lane])
            if lane in self._open:
                state, start = self._open[lane]
                found[state] = found.get(state, 0.0) + now - start
            return found

    def _close(self, lane: str, now: float) -> None:
        state, start = self._open.pop(lane)
        self._spans.append(Span(lane, state, start, now))
        self._seconds[lane][state] += now - start
        if len(self._spans) > self._max_spans:
            del self._spans[: self._max_spans // 10]
