"""The thread that conducts a run: prompts to the generator, completions to the rewards, samples to the trainer.

One round after another it gives the generator the newest adapter and new groups, takes what is finished, and hands
on what has been scored. Whatever is raised in it is kept for `check_health`.
"""

from __future__ import annotations

import logging
import threading
import time

from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.rollout.group_flow import GroupFlow
from trl_moe_ext.grpo.rollout.metrics import RolloutMetrics
from trl_moe_ext.grpo.rollout.sample_queue import SampleQueue
from trl_moe_ext.grpo.rollout.supervisor import Supervisor
from trl_moe_ext.grpo.timeline import REWARDS, Timeline

__all__ = ["Conductor"]

logger = logging.getLogger(__name__)

# How long `stop` waits for a thread that is in a call of the backend, before it kills the process that is waited for.
STOP_TIMEOUT_S = 20.0
# Rewards and the trainer can't wake a thread that waits for the generator: it looks around this often.
COLLECT_TIMEOUT_S = 0.02
# A start of the generator is aborted so often until it has ended: the first time may come before there is a process.
ABORT_EVERY_S = 0.2
# Without anything to collect it is woken; it looks after time limits and a generator that may have died this often.
IDLE_TIMEOUT_S = 0.5


class Conductor:
    """Runs from `start` to `stop` or to a failure.

    Args:
        flow: the groups that are under way; called from the thread only, as `supervisor` is.
        samples: told when no more will come.
        wake: set by whoever has news for the thread.
        adapter: what the generator starts with.

    Attributes:
        failure: what has ended the thread, if anything did.
    """

    def __init__(
        self,
        *,
        flow: GroupFlow,
        supervisor: Supervisor,
        samples: SampleQueue,
        metrics: RolloutMetrics,
        timeline: Timeline,
        wake: threading.Event,
        adapter: AdapterSnapshot,
    ) -> None:
        self._flow, self._supervisor, self._samples = flow, supervisor, samples
        self._metrics, self._timeline, self._wake = metrics, timeline, wake
        self._adapter, self._published_at = adapter, time.monotonic()
        self._stopping = threading.Event()
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="moe-grpo-conductor", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def publish(self, adapter: AdapterSnapshot) -> None:
        """Have the generator use `adapter` from its next round on; of several only the newest is sent."""
        self._published_at, self._adapter = time.monotonic(), adapter
        self._wake.set()

    def stop(self) -> None:
        """End the thread and wait for it; where it hangs in a call of the backend, kill the backend's process."""
        self._stopping.set()
        self._wake.set()
        if self._has_ended() or (self._supervisor.kill() and self._has_ended()):
            return
        logger.error("the rollout backend hangs in a call, and its thread is left behind")

    def _has_ended(self) -> bool:
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._supervisor.abort()
            self._thread.join(ABORT_EVERY_S)
        return not self._thread.is_alive()

    def seconds_in_call(self) -> float:
        """How long the thread has been in one round; 0 while the generator starts, which takes what it takes."""
        if self._supervisor.starting or not self._thread.is_alive():
            return 0.0
        return time.monotonic() - max(self._beat, self._supervisor.started_at)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._round()
        except BaseException as error:  # whatever it is: `check_health` raises it in the trainer's thread
            self._fail(error)
        try:
            self._supervisor.stop("failed" if self.failure else "stopped")
        except BaseException as error:
            self._fail(error)
        finally:
            self._flow.stop()

    def _fail(self, error: BaseException) -> None:
        logger.error("generation has failed: %s", error, exc_info=error)
        self.failure = self.failure or error
        self._samples.fail()

    def _round(self) -> None:
        self._beat = time.monotonic()
        self._wake.clear()
        self._sync()
        self._flow.admit()
        self._rest()
        self._flow.collect(COLLECT_TIMEOUT_S)
        self._flow.hand_on()
        self._timeline.mark(REWARDS, "scoring" if self._flow.scoring else "idle")
        self._flow.report()

    def _sync(self) -> None:
        adapter, published_at = self._adapter, self._published_at
        if self._supervisor.drive(adapter):
            self._metrics.queue.push(
                {"sync/bytes": float(adapter.nbytes), "sync/seconds": time.monotonic() - published_at}
            )

    def _rest(self) -> None:
        """Wait for news while the generator has nothing to do: then there is nothing to wait for in `collect`."""
        if not self._supervisor.generating:
            to_start = self._supervisor.seconds_to_start()
            self._wake.wait(IDLE_TIMEOUT_S if to_start is None else min(IDLE_TIMEOUT_S, to_start))
