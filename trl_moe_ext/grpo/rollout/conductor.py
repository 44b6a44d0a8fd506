"""The thread that conducts a run: prompts to the generator, completions to the rewards, samples to the trainer.

One round after another it gives the generator the newest adapter and new groups, takes what is finished, and hands
on what has been scored. Whatever is raised in it is kept for `check_health`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.rewards.advantages import score_group
from trl_moe_ext.grpo.rewards.scoring import Scored, Scorer
from trl_moe_ext.grpo.rollout.admission import Admission
from trl_moe_ext.grpo.rollout.groups import Group, group_of_request
from trl_moe_ext.grpo.rollout.ledger import Ledger
from trl_moe_ext.grpo.rollout.metrics import RolloutMetrics
from trl_moe_ext.grpo.rollout.prompts import PromptSource
from trl_moe_ext.grpo.rollout.sample_queue import SampleQueue
from trl_moe_ext.grpo.rollout.supervisor import Supervisor
from trl_moe_ext.grpo.rollout.useless_groups import UselessGroups
from trl_moe_ext.grpo.timeline import REWARDS, Timeline

__all__ = ["Conductor", "ConductorOptions"]

logger = logging.getLogger(__name__)

# Rewards and the trainer can't wake a thread that waits for the generator: it looks around this often.
COLLECT_TIMEOUT_S = 0.02
# A start of the generator is aborted so often until it has ended: the first time may come before there is a process.
ABORT_EVERY_S = 0.2
# Without anything to collect it is woken; it looks after time limits and a generator that may have died this often.
IDLE_TIMEOUT_S = 0.5


@dataclass(frozen=True)
class ConductorOptions:
    """Numbers of a run.

    Attributes:
        queue_maxsize: samples that are queued or on their way to be; 0 for any number.
        max_useless_groups: groups without an advantage in a row that are skipped before one is handed on, and groups
            without a reward from the start after which the run is given up.
        skip_zero_advantage: False to skip no group at all.
    """

    num_generations: int
    seed: int
    queue_maxsize: int
    max_useless_groups: int
    skip_zero_advantage: bool
    reward_weights: list[float] | None


class Conductor:
    """Runs from `start` to `stop` or to a failure.

    Args:
        decode: the text of a completion.
        wake: set by whoever has news for the thread.
    """

    def __init__(
        self,
        *,
        prompts: PromptSource,
        ledger: Ledger,
        admission: Admission,
        supervisor: Supervisor,
        scorer: Scorer,
        samples: SampleQueue,
        metrics: RolloutMetrics,
        timeline: Timeline,
        decode: Callable[[tuple[int, ...]], str],
        wake: threading.Event,
        options: ConductorOptions,
        adapter: AdapterSnapshot,
    ) -> None:
        self._prompts, self._ledger, self._admission = prompts, ledger, admission
        self._supervisor, self._scorer, self._samples = supervisor, scorer, samples
        self._metrics, self._timeline, self._decode = metrics, timeline, decode
        self._wake, self._options = wake, options
        self._adapter, self._published_at = adapter, time.monotonic()
        self._first_version = adapter.version
        self._groups: dict[int, Group] = {}
        self._useless = UselessGroups(options.max_useless_groups, skip=options.skip_zero_advantage)
        self._stopping = threading.Event()
        self._live = threading.Condition()
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="moe-grpo-conductor", daemon=True)
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def publish(self, adapter: AdapterSnapshot) -> None:
        """Have the generator use `adapter` from its next round on; of several only the newest is sent."""
        self._published_at, self._adapter = time.monotonic(), adapter
        self._wake.set()

    def stop(self, timeout: float) -> bool:
        """Ask the thread to end, and wait for it; whether it has ended."""
        self._stopping.set()
        self._wake.set()
        with self._live:
            self._live.notify_all()
        deadline = time.monotonic() + timeout
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._supervisor.abort()
            self._thread.join(ABORT_EVERY_S)
        return not self._thread.is_alive()

    def seconds_in_call(self) -> float:
        """How long the thread has been in one round; 0 while the generator starts, which takes what it takes."""
        if self._supervisor.starting or not self._thread.is_alive():
            return 0.0
        return time.monotonic() - max(self._beat, self._supervisor.started_at)

    def wait_live(self, version: int, timeout: float) -> bool:
        """Wait until the generator uses this version or a later one, or the thread has failed; whether it does."""
        with self._live:
            over = self._stopping.is_set
            self._live.wait_for(lambda: self._is_live(version) or over() or self.failure is not None, timeout)
            return self._is_live(version)

    def _is_live(self, version: int) -> bool:
        live = self._supervisor.live_version
        return live is not None and live >= version

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
            self._scorer.stop()

    def _fail(self, error: BaseException) -> None:
        logger.error("generation has failed: %s", error, exc_info=error)
        self.failure = self.failure or error
        self._samples.fail()
        with self._live:
            self._live.notify_all()

    def _round(self) -> None:
        self._beat = time.monotonic()
        self._wake.clear()
        self._sync()
        self._admit()
        self._collect()
        for scored in self._scorer.poll():
            self._hand_on(scored)
        self._timeline.mark(REWARDS, "scoring" if self._scorer.under_way else "idle")
        self._report()

    def _sync(self) -> None:
        adapter, published_at = self._adapter, self._published_at
        before = self._supervisor.live_version
        loaded = self._supervisor.drive(adapter)
        if self._supervisor.live_version != before:
            with self._live:
                self._live.notify_all()
        if loaded:
            self._metrics.queue.push(
                {"sync/bytes": float(adapter.nbytes), "sync/seconds": time.monotonic() - published_at}
            )

    def _admit(self) -> None:
        """Begin groups, as far as there is room in the generator, in the queue and in front of the trainer."""
        live = self._supervisor.live_version
        if live is None:
            return
        while self._supervisor.outstanding < self._supervisor.max_in_flight and self._room_in_queue():
            if not self._admission.allows(self._ledger.admitted, live - self._first_version):
                if not self._starving(live):
                    break
                self._admission.starved()
                continue
            ticket = self._ledger.take()
            prompt = self._prompts[ticket.group_id]
            group = Group(ticket, prompt, self._options.num_generations, self._options.seed)
            self._groups[ticket.group_id] = group
            self._supervisor.ask(group.requests)
        self._supervisor.submit()

    def _starving(self, live: int) -> bool:
        """Whether the trainer waits for what the rule would never let begin."""
        synced = live >= self._samples.trainer_version
        return synced and self._samples.waiting and not self._groups and not self._samples.qsize()

    def _room_in_queue(self) -> bool:
        """Whether another group fits; an empty queue takes one of any size."""
        if not self._options.queue_maxsize:
            return True
        taken = self._samples.qsize() + len(self._groups) * self._options.num_generations
        return not taken or taken + self._options.num_generations <= self._options.queue_maxsize

    def _collect(self) -> None:
        """Take what is finished; this is where the thread waits if there is nothing else to do."""
        if not self._supervisor.generating:
            to_start = self._supervisor.seconds_to_start()
            self._wake.wait(IDLE_TIMEOUT_S if to_start is None else min(IDLE_TIMEOUT_S, to_start))
        for generation in self._supervisor.collect(COLLECT_TIMEOUT_S):
            group = self._groups[group_of_request(generation.id)]
            group.add(generation)
            self._metrics.completion(generation.token_ids)
            if group.complete:
                self._scorer.begin(group, group.completions([self._decode(g.token_ids) for g in group.generations]))

    def _hand_on(self, scored: Scored) -> None:
        """Give a scored group to the trainer, unless there is nothing to learn from it."""
        group_id = scored.group.ticket.group_id
        del self._groups[group_id]
        self._metrics.queue.push({"reward/seconds": scored.seconds})
        scores = score_group(scored.rewards, self._options.reward_weights)
        self._metrics.scored(scores.rewards)
        if self._useless.leaves_out(scores, self._scorer.first_loss):
            self._ledger.skip(group_id)
        else:
            self._samples.put_group(scored.group.samples(scored.completions, scores, self._scorer.names))

    def _report(self) -> None:
        totals = Counter(
            {
                "rollout/restarts_total": self._supervisor.restarts,
                "rollout/zero_advantage_total": self._useless.total,
                "rollout/stale_total": self._samples.dropped_groups,
                **{f"reward/{cause}_total": self._scorer.lost[cause] for cause in ("raised", "timeout", "invalid")},
            }
        )
        self._metrics.push(queue_size=self._samples.qsize(), in_flight=self._supervisor.outstanding, totals=totals)
