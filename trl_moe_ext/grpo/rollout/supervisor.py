"""Keeps a rollout backend going: starts it again when it fails, with the newest adapter and all that was asked for."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.protocol import (
    BackendError,
    BackendOutOfMemoryError,
    Generation,
    GenerationRequest,
    RolloutBackend,
)
from trl_moe_ext.grpo.rollout.file import write_rollout_file
from trl_moe_ext.grpo.timeline import GENERATOR, Timeline

__all__ = ["RolloutError", "Supervisor"]

logger = logging.getLogger(__name__)

MAX_BACK_OFF_S = 30.0

T = TypeVar("T")


class RolloutError(MoeExtError):
    """No more samples will come; its cause tells why."""


class Supervisor:
    """All calls of a backend go through here, from one thread, but `abort`; the attributes may be read from any.

    Args:
        max_restarts: in a row, without a finished completion in between.
        max_in_flight: completions that the backend is asked for at a time; halved each time its memory runs out.
        output_dir: for rollout.json.
        timeline: of the generator.

    Attributes:
        live_version: of the adapter that the backend generates with; None while there is none.
        restarts: starts after the first.
        starting: whether the backend is being started, which may take as long as loading a model does.
        started_at: when it was last started or failed to, on the monotonic clock.
    """

    def __init__(
        self, backend: RolloutBackend, *, max_restarts: int, max_in_flight: int, output_dir: str, timeline: Timeline
    ) -> None:
        self._backend, self._max_restarts, self._output_dir = backend, max_restarts, output_dir
        self._name = type(backend).__name__.removesuffix("Backend").lower()
        self._timeline = timeline
        self._waiting: deque[GenerationRequest] = deque()
        self._asked: dict[str, GenerationRequest] = {}
        self._up = self._ending = False
        self._starts = self._failures = 0
        self._not_before = 0.0
        self._version: int | None = None
        self.starting, self.started_at = False, 0.0
        self.max_in_flight = max_in_flight

    @property
    def restarts(self) -> int:
        return max(0, self._starts - 1)

    @property
    def live_version(self) -> int | None:
        return self._version if self._up else None

    @property
    def outstanding(self) -> int:
        """Completions that were asked for and are not there."""
        return len(self._asked) + len(self._waiting)

    @property
    def generating(self) -> int:
        """Completions that the backend is working on."""
        return len(self._asked)

    def seconds_to_start(self) -> float | None:
        """How long until the backend may be started; None if it is up."""
        return None if self._up else max(0.0, self._not_before - time.monotonic())

    def ask(self, requests: Sequence[GenerationRequest]) -> None:
        """Have completions generated, as soon as the backend has room for them."""
        self._waiting.extend(requests)

    def drive(self, adapter: AdapterSnapshot) -> bool:
        """Start the backend if it is down and its time has come, or give it `adapter` if it has another.

        Returns:
            Whether it has got another adapter by `load_adapter`.

        Raises:
            RolloutError: it was started too often in vain.
        """
        if not self._up:
            if self.seconds_to_start() == 0.0:
                self._start(adapter)
            return False
        return adapter.version != self._version and self._load(adapter)

    def submit(self) -> None:
        """Hand the requests on, as far as the backend has room; raises as `drive` does."""
        room = self.max_in_flight - len(self._asked) if self._up else 0
        requests = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if requests:
            self._asked.update((request.id, request) for request in requests)
            self._attempt(lambda: self._backend.submit(requests))
        if self._up:
            self._mark_state()

    def collect(self, timeout: float) -> list[Generation]:
        """Completions that have been finished since the last call, waiting at most `timeout` seconds for one.

        An idle backend is not waited for, but asked whether it is well; one that is down is not asked at all.
        """
        if not self._up:
            return []
        timeout = timeout if self._asked else 0.0
        found = self._attempt(lambda: self._backend.collect(timeout)) or []
        known = [generation for generation in found if self._asked.pop(generation.id, None) is not None]
        if len(known) < len(found):
            logger.warning("%d completions came that the rollout backend was not asked for", len(found) - len(known))
        if known:
            self._failures = 0
        return known

    def abort(self) -> None:
        """From any thread, before `stop`: what fails from now on is not started again, and a start fails soon."""
        self._ending = True
        if self.starting:
            self._backend.abort()

    def stop(self, state: str = "stopped") -> None:
        """Stop the backend and forget the requests."""
        self._up = False
        self._asked.clear()
        self._waiting.clear()
        self._backend.stop()
        self._tell(state)

    def _start(self, adapter: AdapterSnapshot) -> None:
        self._starts += 1
        state = "restarting" if self._starts > 1 else "starting"
        self._timeline.mark(GENERATOR, "restarting" if self._starts > 1 else "loading")
        self._tell(state)
        self._backend.max_in_flight = self.max_in_flight
        self.starting = True
        try:
            started = self._attempt(lambda: self._backend.start(adapter) or True)
        finally:
            # In this order: another thread that sees it started sees since when, too.
            self.started_at = time.monotonic()
            self.starting = False
        if started:
            self._up, self._version = True, adapter.version
            self._mark_state()
            self._tell("running")

    def _load(self, adapter: AdapterSnapshot) -> bool:
        self._timeline.mark(GENERATOR, "loading")
        loaded = self._attempt(lambda: self._backend.load_adapter(adapter) or True)
        if loaded:
            self._version = adapter.version
            self._mark_state()
            self._tell("running")
        return bool(loaded)

    def _mark_state(self) -> None:
        self._timeline.mark(GENERATOR, "generating" if self._asked else "idle")

    def _attempt(self, call: Callable[[], T]) -> T | None:
        """What the backend answers; None if it failed, which is then seen to."""
        try:
            return call()
        except BackendError as error:
            self._failed(error)
            return None

    def _failed(self, error: BackendError) -> None:
        self._up = False
        self._failures += 1
        # In the order in which they were asked for, before those that have not been submitted.
        self._waiting.extendleft(reversed(self._asked.values()))
        self._asked.clear()
        if self._ending:
            self._backend.stop()
            return
        self._timeline.mark(GENERATOR, "restarting")
        if isinstance(error, BackendOutOfMemoryError) and self.max_in_flight > 1:
            self.max_in_flight //= 2
            logger.warning("the generator ran out of memory; from now on max_inflight_tasks=%d", self.max_in_flight)
        self._backend.stop()
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
        self._tell("restarting")

    def _tell(self, state: str) -> None:
        write_rollout_file(
            self._output_dir,
            backend=self._name,
            pid=self._backend.pid,
            model_version=self._version,
            restarts=self.restarts,
            state=state,
        )
