"""Requests at a server that answers each of them when its completion is finished: a thread waits for each."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest

__all__ = ["RequestThreads"]


class RequestThreads:
    """Asks for completions, so many at a time, from the start to `stop`.

    Each start of a backend has threads and queues of its own: what a thread of an earlier life still has to say is
    for nobody.

    Args:
        ask: called from the threads; returns the completion of a request, or raises.
        count: requests that are at the server at a time.
    """

    def __init__(self, ask: Callable[[GenerationRequest], Generation], count: int) -> None:
        self._ask = ask
        self._jobs: queue.Queue[GenerationRequest | None] = queue.Queue()
        self._results: queue.Queue[Generation | Exception] = queue.Queue()
        self._threads = [threading.Thread(target=self._work, name=f"vllm-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue the requests; returns at once."""
        for request in requests:
            self._jobs.put(request)

    def collect(self, timeout: float) -> list[Generation]:
        """What has been finished since the last call, waiting at most `timeout` seconds for the first.

        Raises:
            Exception: what `ask` raised for a request, once all that was finished before it has been handed over.
        """
        found: list[Generation] = []
        with suppress(queue.Empty):
            result = self._results.get(timeout=timeout)
            while isinstance(result, Generation):
                found.append(result)
                result = self._results.get_nowait()
            if not found:
                raise result
            self._results.put(result)
        return found

    def stop(self, timeout: float) -> None:
        """Have the threads end, and wait for them; what `ask` waits for has to be cut off before."""
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (request := self._jobs.get()) is not None:
            try:
                self._results.put(self._ask(request))
            except Exception as error:  # `collect` raises it
                self._results.put(error)
