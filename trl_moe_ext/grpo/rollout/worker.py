"""The rollout worker of an async run: assembles prompts, generator, rewards and queue behind TRL's protocol."""

from __future__ import annotations

import copy
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.protocol import RolloutBackend
from trl_moe_ext.grpo.rewards.process import check_main_is_guarded
from trl_moe_ext.grpo.rewards.scoring import Scorer
from trl_moe_ext.grpo.rollout.admission import Admission
from trl_moe_ext.grpo.rollout.conductor import Conductor, ConductorOptions
from trl_moe_ext.grpo.rollout.ledger import Ledger
from trl_moe_ext.grpo.rollout.metrics import RolloutMetrics
from trl_moe_ext.grpo.rollout.prompts import PromptSource
from trl_moe_ext.grpo.rollout.sample_queue import SampleQueue, StopRequested
from trl_moe_ext.grpo.rollout.supervisor import RolloutError, Supervisor
from trl_moe_ext.grpo.timeline import Timeline

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig

__all__ = ["RolloutError", "RolloutWorker", "StopRequested"]

logger = logging.getLogger(__name__)

# How long `stop` waits for a thread that is in a call of the backend, before it kills the process that is waited for.
STOP_TIMEOUT_S = 20.0
# A backend notices by itself, after heartbeat_stale_after_s, that its process hangs; this many times that is for a
# backend whose own call never comes back.
STALE_FACTOR = 3.0
# Groups in a row without an advantage that are skipped before one is handed on, and without any reward from the start
# before the run is given up, in steps of the trainer.
MAX_USELESS_STEPS = 4


class RolloutWorker:
    """What TRL's trainer sees of generation; satisfies its `RolloutWorkerProtocol`.

    Args:
        backend: where completions come from; started and stopped by this worker, and called from its thread only.
        dataset: with a column ``prompt``; the others are arguments of the reward functions.
        reward_funcs: called once for each group, as TRL calls them.
        args: `max_inflight_tasks` has been filled in.
        groups_per_step: that one optimizer step takes.
        output_dir: where rollout.json is written.
        max_length: tokens of prompt and completion that the model can take, as far as its tokenizer does not tell.

    Attributes:
        rollout_buffer: the samples.
        metrics_queue: what was measured, for TRL to drain when it logs.

    Raises:
        ConfigError: the dataset, a reward function or an option can't be used; or this process was started by another
            that runs the same script, and only imports it.
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
        output_dir: str,
        max_length: int | None = None,
    ) -> None:
        check_main_is_guarded()
        _check(args, reward_funcs)
        # The trainer's thread may use its own at the same time.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._backend, self._args, self._reward_funcs = backend, args, reward_funcs
        self._groups_per_step, self._timeline, self._output_dir = groups_per_step, timeline, output_dir
        self._prompts = PromptSource(
            dataset,
            self._tokenizer,
            seed=args.seed,
            shuffle=getattr(args, "shuffle_dataset", True),
            chat_template_kwargs=args.chat_template_kwargs,
            max_prompt_length=_room_for_prompts(args, tokenizer, max_length),
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
        if conductor is None or conductor.stop(STOP_TIMEOUT_S):
            return
        pid = self._backend.pid
        if pid is not None:
            logger.warning("the rollout backend does not answer; its process %d is killed", pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError) as error:
                logger.warning("process %d was not killed: %s", pid, error)
            if conductor.stop(STOP_TIMEOUT_S):
                return
        logger.error("the rollout backend hangs in a call, and its thread is left behind")

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
        return {**self._ledger.state(), "num_done": self._ledger.num_done(), "prompts": self._order()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, before `start`.

        Raises:
            ConfigError: it is of other prompts, or damaged.
        """
        if self._conductor is not None:
            raise RolloutError("the rollout worker is running already; restore its state before the start")
        if state.get("prompts") != self._order():
            raise ConfigError(
                f"the checkpoint counts prompts of {state.get('prompts')}, but this run has {self._order()}; resume "
                "with the dataset and the options that it was begun with"
            )
        self._ledger.restore(state)

    def wait_live(self, version: int, timeout: float) -> None:
        """Wait until the generator uses this version of the adapter or a later one.

        Raises:
            TimeoutError: it does not after `timeout` seconds.
            RolloutError: it never will.
        """
        conductor = self._conductor
        if conductor is None:
            raise RolloutError("the rollout worker has not been started")
        if not conductor.wait_live(version, timeout):
            self.check_health(float("inf"))
            raise TimeoutError(f"the generator has no version {version} of the adapter after {timeout:g} s")

    def _order(self) -> dict[str, Any]:
        """What the order of prompts depends on."""
        shuffle = getattr(self._args, "shuffle_dataset", True)
        return {"rows": len(self._prompts), "seed": self._args.seed, "shuffle": shuffle}

    def _make_conductor(self, snapshot: AdapterSnapshot) -> Conductor:
        args = self._args
        return Conductor(
            prompts=self._prompts,
            ledger=self._ledger,
            admission=Admission(args.max_staleness, self._groups_per_step * args.weight_sync_steps),
            supervisor=Supervisor(
                self._backend,
                max_restarts=args.max_rollout_restarts,
                max_in_flight=args.max_inflight_tasks,
                output_dir=self._output_dir,
                timeline=self._timeline,
            ),
            scorer=Scorer(
                self._reward_funcs,
                pool_kind=args.reward_pool,
                concurrency=args.reward_concurrency,
                timeout_s=args.reward_timeout_s,
                wake=self._wake.set,
            ),
            samples=self.rollout_buffer,
            metrics=self._metrics,
            timeline=self._timeline,
            decode=lambda token_ids: str(self._tokenizer.decode(token_ids, skip_special_tokens=True)),
            wake=self._wake,
            options=ConductorOptions(
                num_generations=args.num_generations,
                seed=args.seed,
                queue_maxsize=args.queue_maxsize,
                max_useless_groups=MAX_USELESS_STEPS * self._groups_per_step,
                skip_zero_advantage=args.skip_zero_advantage,
                reward_weights=args.reward_weights,
            ),
            adapter=snapshot,
        )


def _check(args: AsyncMoeGRPOConfig, reward_funcs: list[Callable[..., Any]]) -> None:
    if not reward_funcs:
        raise ConfigError("there is no reward function; name one at least")
    if args.reward_weights is not None and len(args.reward_weights) != len(reward_funcs):
        raise ConfigError(
            f"reward_weights has {len(args.reward_weights)} weights for {len(reward_funcs)} reward functions; give "
            "one each"
        )
    if args.max_inflight_tasks < 1:
        raise ConfigError(f"max_inflight_tasks={args.max_inflight_tasks} generates nothing; use 1 or more")


def _room_for_prompts(
    args: AsyncMoeGRPOConfig, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> int | None:
    """Tokens that a prompt may have; None for any number.

    Raises:
        ConfigError: completions leave no room at all.
    """
    # transformers gives a tokenizer without a limit one of 1e30.
    limits = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < 1e12 else []
    limits += [max_length] if max_length is not None else []
    limits += [args.token_budget] if args.token_budget is not None and args.token_budget > 0 else []
    if not limits:
        return None
    room: int = min(limits) - args.max_completion_length
    if room < 1:
        raise ConfigError(
            f"max_completion_length={args.max_completion_length} leaves no room for a prompt within {min(limits)} "
            "tokens, the least of what the model, its tokenizer and token_budget allow; lower it"
        )
    return room
