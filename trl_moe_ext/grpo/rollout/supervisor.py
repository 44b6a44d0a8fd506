"""Keeps a rollout backend going: starts it again when it fails, with the newest adapter and all that was asked for."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.errors import BackendError, BackendOutOfMemoryError
from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest
from trl_moe_ext.grpo.backends.protocol import RolloutBackend
from trl_moe_ext.grpo.rollout.back_off import BackOff
from trl_moe_ext.grpo.rollout.errors import RolloutError
from trl_moe_ext.grpo.rollout.file import write_rollout_file
from trl_moe_ext.grpo.rollout.open_requests import OpenRequests
from trl_moe_ext.grpo.timeline import GENERATOR, Timeline

__all__ = ["RolloutError", "Supervisor"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Supervisor:
    """All calls of a backend go through here: from one thread, but `abort`, `kill` and reading the attributes.

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
        self._backend, self._output_dir = backend, output_dir
        self._name = type(backend).__name__.removesuffix("Backend").lower()
        self._timeline = timeline
        self._requests = OpenRequests()
        self._back_off = BackOff(max_restarts)
        self._up = self._ending = False
        self._starts = 0
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
        return len(self._requests)

    @property
    def generating(self) -> int:
        """Completions that the backend is working on."""
        return self._requests.submitted

    def seconds_to_start(self) -> float | None:
        """How long until the backend may be started; None if it is up."""
        return None if self._up else self._back_off.seconds_left()

    def ask(self, requests: Sequence[GenerationRequest]) -> None:
        """Have completions generated, as soon as the backend has room for them."""
        self._requests.add(requests)

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
        requests = self._requests.submit(self.max_in_flight - self._requests.submitted) if self._up else []
        if requests:
            self._attempt(lambda: self._backend.submit(requests))
        if self._up:
            self._mark_state()

    def collect(self, timeout: float) -> list[Generation]:
        """Completions that have been finished since the last call, waiting at most `timeout` seconds for one.

        An idle backend is not waited for, but asked whether it is well; one that is down is not asked at all.
        """
        if not self._up:
            return []
        timeout = timeout if self._requests.submitted else 0.0
        found = self._attempt(lambda: self._backend.collect(timeout)) or []
        known = self._requests.finish(found)
        if len(known) < len(found):
            logger.warning("%d completions came that the rollout backend was not asked for", len(found) - len(known))
        if known:
            self._back_off.succeeded()
        return known

    def abort(self) -> None:
        """From any thread, before `stop`: what fails from now on is not started again, and a start fails soon."""
        self._ending = True
        if self.starting:
            self._backend.abort()

    def kill(self) -> bool:
        """From any thread: end the process of a backend that does not answer; False if there is none here."""
        pid = self._backend.pid
        if pid is None:
            return False
        logger.warning("the rollout backend does not answer; its process %d is killed", pid)
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError) as error:
            logger.warning("process %d was not killed: %s", pid, error)
        return True

    def stop(self, state: str = "stopped") -> None:
        """Stop the backend and forget the requests."""
        self._up = False
        self._requests.clear()
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
            self._up = True
            self._runs_with(adapter)

    def _load(self, adapter: AdapterSnapshot) -> bool:
        self._timeline.mark(GENERATOR, "loading")
        loaded = self._attempt(lambda: self._backend.load_adapter(adapter) or True)
        if loaded:
            self._runs_with(adapter)
        return bool(loaded)

    def _runs_with(self, adapter: AdapterSnapshot) -> None:
        self._version = adapter.version
        self._mark_state()
        self._tell("running")

    def _mark_state(self) -> None:
        self._timeline.mark(GENERATOR, "generating" if self._requests.submitted else "idle")

    def _attempt(self, call: Callable[[], T]) -> T | None:
        """What the backend answers; None if it failed, which is then seen to."""
        try:
            return call()
        except BackendError as error:
            self._failed(error)
            return None

    def _failed(self, error: BackendError) -> None:
        self._up = False
        self._requests.take_back()
        if self._ending:
            self._backend.stop()
            return
        self._timeline.mark(GENERATOR, "restarting")
        if isinstance(error, BackendOutOfMemoryError) and self.max_in_flight > 1:
            self.max_in_flight //= 2
            logger.warning("the generator ran out of memory; from now on max_inflight_tasks=%d", self.max_in_flight)
        self._backend.stop()
        self._back_off.failed(error)
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
