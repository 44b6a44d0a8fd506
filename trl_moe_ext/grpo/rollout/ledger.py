"""Which groups are done: every prompt is trained on once an epoch, whatever is given back, skipped or lost on the way.

A group has the id of its position in the order of prompts: 0, 1, 2, ... An id is handed out by `take`, and then given
back, skipped or finished. What is handed out and not done is forgotten by a checkpoint: after it, it is handed out
again.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_moe_ext.errors import ConfigError

__all__ = ["Ledger", "Ticket"]


@dataclass(frozen=True)
class Ticket:
    """The right to generate a group.

    Attributes:
        attempt: how often the group had been given back before.
    """

    group_id: int
    attempt: int = 0


class Ledger:
    """The books; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._restart(0, set())

    def _restart(self, first_undone: int, done_beyond: set[int]) -> None:
        self._first_undone = first_undone
        self._done_beyond = done_beyond
        self._next = first_undone
        self._attempts: dict[int, int] = {}  # of ids under way
        self._given_back: list[tuple[int, int]] = []  # id, attempt; the lowest first
        self._skipped: set[int] = set()
        self._admitted = 0

    def take(self) -> Ticket:
        """The lowest id that is neither done nor under way."""
        with self._lock:
            if self._given_back:
                group_id, attempt = heapq.heappop(self._given_back)
            else:
                while self._next in self._done_beyond:
                    self._next += 1
                group_id, attempt = self._next, 0
                self._next += 1
            self._attempts[group_id] = attempt
            self._admitted += 1
            return Ticket(group_id, attempt)

    def give_back(self, group_id: int) -> None:
        """The group was generated in vain and has to be generated again."""
        with self._lock:
            heapq.heappush(self._given_back, (group_id, self._attempts.pop(group_id) + 1))
            self._admitted -= 1

    def skip(self, group_id: int) -> None:
        """The group is left out for good."""
        with self._lock:
            del self._attempts[group_id]
            self._skipped.add(group_id)
            self._admitted -= 1
            self._mark_done(group_id)

    def finish(self, group_ids: Iterable[int]) -> None:
        """The groups were trained on; telling so again does nothing."""
        with self._lock:
            for group_id in group_ids:
                if self._attempts.pop(group_id, None) is not None:
                    self._mark_done(group_id)

    def _mark_done(self, group_id: int) -> None:
        self._done_beyond.add(group_id)
        while self._first_undone in self._done_beyond:
            self._done_beyond.remove(self._first_undone)
            self._first_undone += 1

    @property
    def admitted(self) -> int:
        """Groups taken since the start or the last `restore`, less those skipped or given back."""
        with self._lock:
            return self._admitted

    def skipped(self) -> set[int]:
        """Ids that were skipped since the start or the last `restore`."""
        with self._lock:
            return set(self._skipped)

    def num_done(self) -> int:
        """Groups finished or skipped in the whole run."""
        with self._lock:
            return self._first_undone + len(self._done_beyond)

    def state(self) -> dict[str, Any]:
        """For `restore`; JSON."""
        with self._lock:
            return {"first_undone": self._first_undone, "done_beyond": sorted(self._done_beyond)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: all that was not done at that time is handed out again, in order.

        Raises:
            ConfigError: `state` is not of `state()`.
        """
        try:
            first, beyond = int(state["first_undone"]), {int(group_id) for group_id in state["done_beyond"]}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the checkpoint does not tell which groups were done: {dict(state)} lacks a readable {error}. Resume "
                "from another checkpoint"
            ) from error
        if first < 0 or any(group_id <= first for group_id in beyond):
            raise ConfigError(
                f"the checkpoint contradicts itself: {first} is its first group that was not done, and of those after "
                f"it {sorted(beyond)} were. Resume from another checkpoint"
            )
        with self._lock:
            self._restart(first, beyond)
