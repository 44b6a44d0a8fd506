"""The way of the groups: begun while there is room for them, generated, scored, and handed to the trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig

__all__ = ["GroupFlow"]


# Groups in a row without an advantage that are skipped before one is handed on, and without any reward from the start
# before the run is given up, in steps of the trainer.
MAX_USELESS_STEPS = 4


class GroupFlow:
    """Four steps, each of which does what can be done now: `admit`, `collect`, `hand_on` and `report`. For one thread.

    Args:
        args: options of the run.
        groups_per_step: that one optimizer step takes.
        first_version: of the adapter that the run, or what is left of it, begins with.
        decode: the text of a completion.
    """

    def __init__(
        self,
        *,
        prompts: PromptSource,
        ledger: Ledger,
        supervisor: Supervisor,
        scorer: Scorer,
        samples: SampleQueue,
        metrics: RolloutMetrics,
        args: AsyncMoeGRPOConfig,
        groups_per_step: int,
        first_version: int,
        decode: Callable[[tuple[int, ...]], str],
    ) -> None:
        self._prompts, self._ledger = prompts, ledger
        self._supervisor, self._scorer, self._samples = supervisor, scorer, samples
        self._metrics, self._first_version, self._decode = metrics, first_version, decode
        self._args = args
        self._groups: dict[int, Group] = {}
        self._admission = Admission(args.max_staleness, groups_per_step * args.weight_sync_steps)
        self._useless = UselessGroups(MAX_USELESS_STEPS * groups_per_step, skip=args.skip_zero_advantage)

    @property
    def scoring(self) -> bool:
        """Whether rewards are waited for."""
        return bool(self._scorer.under_way)

    def admit(self) -> None:
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
            group = Group(ticket, prompt, self._args.num_generations, self._args.seed)
            self._groups[ticket.group_id] = group
            self._supervisor.ask(group.requests)
        self._supervisor.submit()

    def collect(self, timeout: float) -> None:
        """Take what the generator has finished, waiting at most so many seconds; begin to score what is complete."""
        for generation in self._supervisor.collect(timeout):
            group = self._groups[group_of_request(generation.id)]
            group.add(generation)
            self._metrics.completion(generation.token_ids)
            if group.complete:
                self._scorer.begin(group, group.completions([self._decode(g.token_ids) for g in group.generations]))

    def hand_on(self) -> None:
        """Give groups that have been scored to the trainer, but those that there is nothing to learn from.

        Raises:
            ConfigError: the reward functions can't be called at all.
            RolloutError: no completion has a reward.
        """
        for scored in self._scorer.poll():
            self._hand_on(scored)

    def report(self) -> None:
        """Push the metrics of the whole way."""
        totals = Counter(
            {
                "rollout/restarts_total": self._supervisor.restarts,
                "rollout/zero_advantage_total": self._useless.total,
                "rollout/stale_total": self._samples.dropped_groups,
                **{f"reward/{cause}_total": self._scorer.lost[cause] for cause in ("raised", "timeout", "invalid")},
            }
        )
        self._metrics.push(queue_size=self._samples.qsize(), in_flight=self._supervisor.outstanding, totals=totals)

    def stop(self) -> None:
        """End all calls of reward functions."""
        self._scorer.stop()

    def _starving(self, live: int) -> bool:
        """Whether the trainer waits for what the rule would never let begin."""
        synced = live >= self._samples.trainer_version
        return synced and self._samples.waiting and not self._groups and not self._samples.qsize()

    def _room_in_queue(self) -> bool:
        """Whether another group fits; an empty queue takes one of any size."""
        if not self._args.queue_maxsize:
            return True
        taken = self._samples.qsize() + len(self._groups) * self._args.num_generations
        return not taken or taken + self._args.num_generations <= self._args.queue_maxsize

    def _hand_on(self, scored: Scored) -> None:
        group_id = scored.group.ticket.group_id
        del self._groups[group_id]
        self._metrics.queue.push({"reward/seconds": scored.seconds})
        scores = score_group(scored.rewards, self._args.reward_weights)
        self._metrics.scored(scores.rewards)
        if self._useless.leaves_out(scores, self._scorer.first_loss):
            self._ledger.skip(group_id)
        else:
            self._samples.put_group(scored.group.samples(scored.completions, scores, self._scorer.names))
