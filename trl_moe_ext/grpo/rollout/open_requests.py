"""Completions that were asked for and are not there: what a backend owes, and what waits for room in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest

__all__ = ["OpenRequests"]


class OpenRequests:
    """Requests in the order in which they were made, first those that the backend has."""

    def __init__(self) -> None:
        self._submitted: dict[str, GenerationRequest] = {}
        self._waiting: deque[GenerationRequest] = deque()

    def __len__(self) -> int:
        return len(self._submitted) + len(self._waiting)

    @property
    def submitted(self) -> int:
        """How many the backend has."""
        return len(self._submitted)

    def add(self, requests: Sequence[GenerationRequest]) -> None:
        """They wait until `submit` takes them."""
        self._waiting.extend(requests)

    def submit(self, room: int) -> list[GenerationRequest]:
        """At most `room` of those that wait, which the backend is given now."""
        requests = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        self._submitted.update((request.id, request) for request in requests)
        return requests

    def finish(self, generations: Sequence[Generation]) -> list[Generation]:
        """Those of the completions that the backend was asked for; they are owed no more."""
        return [generation for generation in generations if self._submitted.pop(generation.id, None) is not None]

    def take_back(self) -> None:
        """The backend has lost what it had: that comes first when there is room again, in its old order."""
        self._waiting.extendleft(reversed(self._submitted.values()))
        self._submitted.clear()

    def clear(self) -> None:
        """Nobody waits for any of them."""
        self._submitted.clear()
        self._waiting.clear()
