"""The rollout worker of an async run: assembles prompts, generator, rewards and queue behind TRL's protocol."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.protocol import RolloutBackend
from trl_moe_ext.grpo.rewards.scoring import Scorer
from trl_moe_ext.grpo.rollout.conductor import Conductor
from trl_moe_ext.grpo.rollout.errors import RolloutError
from trl_moe_ext.grpo.rollout.group_flow import GroupFlow
from trl_moe_ext.grpo.rollout.ledger import Ledger
from trl_moe_ext.grpo.rollout.metrics import RolloutMetrics
from trl_moe_ext.grpo.rollout.prompt_room import room_for_prompts
from trl_moe_ext.grpo.rollout.prompts import PromptSource
from trl_moe_ext.grpo.rollout.sample_queue import SampleQueue, StopRequested
from trl_moe_ext.grpo.rollout.supervisor import Supervisor
from trl_moe_ext.grpo.timeline import Timeline

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig

__all__ = ["RolloutError", "RolloutWorker", "StopRequested"]

# A backend notices by itself, after heartbeat_stale_after_s, that its process hangs; this many times that is for a
# backend whose own call never comes back.
STALE_FACTOR = 3.0


class RolloutWorker:
    """What TRL's trainer sees of generation; satisfies its `RolloutWorkerProtocol`.

    Args:
        backend: where completions come from; started and stopped by this worker, and called from its thread only.
        dataset: with a column ``prompt``; the others are arguments of the reward functions.
        reward_funcs: called once for each group, as TRL calls them; `arguments.reward_functions` has checked them.
        args: `max_inflight_tasks` has been filled in.
        groups_per_step: that one optimizer step takes.
        max_length: tokens of prompt and completion that the model can take, as far as its tokenizer does not tell.

    Attributes:
        rollout_buffer: the samples.
        metrics_queue: what was measured, for TRL to drain when it logs.

    Raises:
        ConfigError: the dataset or an option can't be used.
    """

    def __init__(
        self,
        backend: RolloutBackend,
        *,
        dataset: Dataset,
        reward_funcs: list[Callable[..., Any]],
        tokenizer: PreTrainedTokenizerBase,
        args: AsyncMoeGRPOConfig,
        groups_per_step: int,
        timeline: Timeline,
        max_length: int | None = None,
    ) -> None:
        assert args.max_inflight_tasks > 0, f"max_inflight_tasks={args.max_inflight_tasks} was not filled in"
        # The trainer's thread may use its own at the same time.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._backend, self._args, self._reward_funcs = backend, args, reward_funcs
        self._groups_per_step, self._timeline = groups_per_step, timeline
        self._prompts = PromptSource(
            dataset,
            self._tokenizer,
            seed=args.seed,
            shuffle=getattr(args, "shuffle_dataset", True),
            chat_template_kwargs=args.chat_template_kwargs,
            max_prompt_length=room_for_prompts(args, tokenizer, max_length),
        )
        backend.expect_prompts(self._prompts.longest)
        self._wake = threading.Event()
        self._ledger = Ledger()
        self._metrics = RolloutMetrics(
            timeline, max_completion_length=args.max_completion_length, eos_token_id=tokenizer.eos_token_id
        )
        self.metrics_queue = self._metrics.queue
        self.rollout_buffer = SampleQueue(
            max_staleness=args.max_staleness,
            give_back=self._ledger.give_back,
            push_metrics=self.metrics_queue.push,
            timeline=timeline,
            wake=self._wake.set,
        )
        self._snapshot: AdapterSnapshot | None = None
        self._conductor: Conductor | None = None

    def publish(self, snapshot: AdapterSnapshot) -> None:
        """The newest adapter, which the generator gets as soon as it can; before `start`, what it starts with."""
        self._snapshot = snapshot
        self.update_model_version(snapshot.version)
        if self._conductor is not None:
            self._conductor.publish(snapshot)

    def update_model_version(self, model_version: int) -> None:
        """The version that the trainer is at; TRL calls it after a sync."""
        self.rollout_buffer.trainer_version = model_version

    def start(self) -> None:
        """Begin to generate all that is not done; returns at once."""
        if self._conductor is not None:
            raise RolloutError("the rollout worker is running already; stop it first")
        if self._snapshot is None:
            raise RolloutError("there is no adapter to generate with; publish one before the start")
        self.rollout_buffer.reopen()
        self._ledger.restore(self._ledger.state())
        self._conductor = self._make_conductor(self._snapshot)
        self._conductor.start()

    def stop(self) -> None:
        """End generation and rewards, and leave no process or thread behind; again it does nothing."""
        conductor, self._conductor = self._conductor, None
        if conductor is not None:
            conductor.stop()

    def check_health(self, stale_after_s: float) -> None:
        """Raise RolloutError, with its cause if it has one, if no more samples will come."""
        conductor = self._conductor
        if conductor is None:
            raise RolloutError("the rollout worker is not running: it has not been started, or was stopped")
        if conductor.failure is not None:
            raise RolloutError(f"generation has ended: {conductor.failure}") from conductor.failure
        seconds = conductor.seconds_in_call()
        if seconds > STALE_FACTOR * stale_after_s:
            raise RolloutError(
                f"the rollout backend has been in one call for {seconds:.0f} s; with "
                f"heartbeat_stale_after_s={stale_after_s:g} it should have told that it hangs. Raise that if it only "
                "takes long"
            )

    def request_stop(self) -> None:
        """Make a `rollout_buffer.get` that would wait, or does, raise StopRequested; also from a signal handler."""
        self.rollout_buffer.request_stop()

    def groups_finished(self, group_ids: Iterable[int]) -> None:
        """These groups were trained on, in an optimizer step that is complete."""
        self._ledger.finish(group_ids)

    def skipped_groups(self) -> set[int]:
        """Groups that were left out for good since the start."""
        return self._ledger.skipped()

    def state(self) -> dict[str, Any]:
        """For a checkpoint, JSON: which groups are done, and of what order of prompts.

        ``num_done`` is how many groups were trained on or skipped in the whole run.
        """
        return {**self._ledger.state(), "num_done": self._ledger.num_done(), "prompts": self._prompts.order}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, before `start`.

        Raises:
            ConfigError: it is of other prompts, or damaged.
        """
        if self._conductor is not None:
            raise RolloutError("the rollout worker is running already; restore its state before the start")
        self._prompts.check_order(state.get("prompts"))
        self._ledger.restore(state)

    def _make_conductor(self, snapshot: AdapterSnapshot) -> Conductor:
        supervisor = self._make_supervisor()
        return Conductor(
            flow=self._make_flow(supervisor, snapshot.version),
            supervisor=supervisor,
            samples=self.rollout_buffer,
            metrics=self._metrics,
            timeline=self._timeline,
            wake=self._wake,
            adapter=snapshot,
        )

    def _make_supervisor(self) -> Supervisor:
        return Supervisor(
            self._backend,
            max_restarts=self._args.max_rollout_restarts,
            max_in_flight=self._args.max_inflight_tasks,
            output_dir=self._args.output_dir,
            timeline=self._timeline,
        )

    def _make_flow(self, supervisor: Supervisor, first_version: int) -> GroupFlow:
        args = self._args
        return GroupFlow(
            prompts=self._prompts,
            ledger=self._ledger,
            supervisor=supervisor,
            scorer=Scorer(
                self._reward_funcs,
                pool_kind=args.reward_pool,
                concurrency=args.reward_concurrency,
                timeout_s=args.reward_timeout_s,
                wake=self._wake.set,
            ),
            samples=self.rollout_buffer,
            metrics=self._metrics,
            args=args,
            groups_per_step=self._groups_per_step,
            first_version=first_version,
            decode=lambda token_ids: str(self._tokenizer.decode(token_ids, skip_special_tokens=True)),
        )
