"""One event loop for all calls of async reward functions: clients and semaphores belong to the loop that used them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Coroutine
from typing import Any

from trl_moe_ext.grpo.rewards.answers import RewardTimeoutError

__all__ = ["EventLoop"]

logger = logging.getLogger(__name__)

# A loop that has not got round to a cancellation after so long is blocked by a function that never awaits.
ANSWERS_WITHIN_S = 1.0


class EventLoop:
    """Runs in a thread of its own from the first call on. `run` and `stop` are for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._stopped = False

    def run(self, awaitable: Awaitable[Any], timeout_s: float) -> Any:
        """What the awaitable comes to.

        Raises:
            RewardTimeoutError: it took longer than `timeout_s`, and was cancelled.
            Exception: whatever it raises.
        """

        async def awaited() -> Any:
            try:
                return await awaitable
            except (SystemExit, KeyboardInterrupt) as error:  # which would end the loop, for all others too
                raise RuntimeError(f"it was ended by {error!r}") from error

        future, running = self._begin(awaited())
        concurrent.futures.wait([future], timeout_s)
        if not future.done():
            future.cancel()
            self._replace_if_blocked(running)
            raise RewardTimeoutError
        return future.result()

    def stop(self) -> None:
        """Cancel all that runs; later calls are refused. Returns at once."""
        with self._lock:
            self._stopped = True
            if self._running is not None:
                self._running.end()

    def _begin(self, coroutine: Coroutine[Any, Any, Any]) -> tuple[concurrent.futures.Future[Any], _Running]:
        # Under the lock, so that what is begun before the end of the loop is cancelled with it.
        with self._lock:
            if self._stopped:
                coroutine.close()
                raise concurrent.futures.CancelledError("the pool has been stopped")
            if self._running is None:
                self._running = _Running()
            return asyncio.run_coroutine_threadsafe(coroutine, self._running.loop), self._running

    def _replace_if_blocked(self, running: _Running) -> None:
        if running.answers(ANSWERS_WITHIN_S):
            return
        with self._lock:
            if self._running is not running:
                return
            running.end()
            self._running = None
        logger.warning(
            "an async reward function blocks its event loop, which is left behind and replaced: await what takes "
            "long, or make the function a sync one"
        )


class _Running:
    """A loop and its thread."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="moe-grpo-reward-loop", daemon=True).start()

    def _run(self) -> None:
        # The runner cancels, when it is closed, whatever else is in the loop.
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._over.wait())

    def end(self) -> None:
        self.loop.call_soon_threadsafe(self._over.set)

    def answers(self, within_s: float) -> bool:
        """Whether the loop gets round to anything new in that time; one that has ended counts as well."""
        seen = threading.Event()
        try:
            self.loop.call_soon_threadsafe(seen.set)
        except RuntimeError:  # it is closed
            return True
        return seen.wait(within_s)
