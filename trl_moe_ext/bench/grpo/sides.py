"""TRL's GRPOTrainer and our asynchronous trainer with the same options, and its generator alone, timed."""

from __future__ import annotations

import gc
import queue
import time
from typing import Any

from trl import GRPOConfig, GRPOTrainer

from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.bench.grpo.clock import Measured, StepClock
from trl_moe_ext.bench.grpo.plan import Plan
from trl_moe_ext.bench.grpo.task import Scorer, prompts
from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.rollout.worker import RolloutWorker
from trl_moe_ext.grpo.sample import MoeRolloutSample
from trl_moe_ext.grpo.timeline import GENERATOR, TRAINER
from trl_moe_ext.grpo.trainer import AsyncMoeGRPOTrainer
from trl_moe_ext.hosts.trl_grpo_options import with_bounded_cache

__all__ = ["measure"]

_NO_TOKEN = -1
_STALE_AFTER_S = 120.0


class TimedSyncTrainer(with_bounded_cache(GRPOTrainer)):  # type: ignore[misc]
    """With the cache that `trl grpo --peft_type moe_lora` has; the seconds that generation took are counted."""

    scorer: Scorer
    generation_seconds = 0.0

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        generated = super()._generate_single_turn(*args, **kwargs)
        self.generation_seconds += time.perf_counter() - began
        return generated

    def read(self) -> dict[str, float]:
        """Counters for the clock."""
        waits = {"generation": self.generation_seconds, "reward_wait": self.scorer.waited}
        return self.scorer.generated() | waits


class EndlessAsyncTrainer(AsyncMoeGRPOTrainer):
    """No token ends a completion, whatever the model says: all have the same length."""

    scorer: Scorer

    @property
    def eos_token_ids(self) -> list[int]:
        """Those of the generator."""
        return []

    @eos_token_ids.setter
    def eos_token_ids(self, found: list[int]) -> None:
        """TRL sets those of the model."""

    def read(self) -> dict[str, float]:
        """Counters for the clock: with the seconds of each state of each lane."""
        lanes = {lane: self.timeline.seconds(lane) for lane in (TRAINER, GENERATOR)}
        states = {f"{lane}/{state}": value for lane, states in lanes.items() for state, value in states.items()}
        return self.scorer.generated() | states


def measure(plan: Plan, output_dir: str) -> Measured:
    """Do as planned, in the calling process.

    Raises:
        MoeExtError: completions were not as long as planned.
    """
    scorer = Scorer(plan.latency)
    if plan.side == "generator":
        generator = _async(plan, output_dir, scorer, threads=len(plan.cores))
        _keep_out_of_collections()
        clock = _generate(plan, generator)
    else:
        trainer = _sync(plan, output_dir, scorer) if plan.side == "sync" else _async(plan, output_dir, scorer)
        clock = StepClock(trainer.read)
        trainer.add_callback(clock)
        _keep_out_of_collections()
        trainer.train()
    measured = clock.measured(plan.warm_up)
    if measured.read["tokens"] != measured.read["completions"] * plan.completion_length:
        raise MoeExtError(
            f"the {plan.side} side generated {measured.read['tokens']:.0f} tokens in "
            f"{measured.read['completions']:.0f} completions, which should have {plan.completion_length} each"
        )
    return measured


def _keep_out_of_collections() -> None:
    """Leave all that is loaded to itself.

    transformers collects garbage twice in each `generate_batch`, which in a process with so many objects takes longer
    than a small model generates. It would count against the synchronous side alone, and has nothing to do with the
    order of the work, which is what is compared.
    """
    gc.collect()
    gc.freeze()


def _sync(plan: Plan, output_dir: str, scorer: Scorer) -> TimedSyncTrainer:
    args = GRPOConfig(
        **_options(plan, output_dir),
        use_transformers_continuous_batching=True,
        generation_kwargs={"eos_token_id": _NO_TOKEN},
    )
    judge = scorer.reward_function(plan.num_generations, plan.concurrency)
    trainer = TimedSyncTrainer(plan.model, judge, args, prompts(), peft_config=MoeLoraConfig(r=plan.rank))
    trainer.scorer = scorer
    return trainer


def _async(plan: Plan, output_dir: str, scorer: Scorer, threads: int | None = None) -> EndlessAsyncTrainer:
    args = AsyncMoeGRPOConfig(
        **_options(plan, output_dir),
        max_staleness=plan.max_staleness,
        reward_concurrency=plan.concurrency,
        rollout_num_threads=threads,
    )
    judge = scorer.reward_function(None, plan.concurrency)
    trainer = EndlessAsyncTrainer(plan.model, judge, args, prompts(), peft_config=MoeLoraConfig(r=plan.rank))
    trainer.scorer = scorer
    return trainer


def _generate(plan: Plan, trainer: EndlessAsyncTrainer) -> StepClock:
    """Take the samples of each step as soon as they are there, and send the adapter again, as after a step."""
    clock, worker = StepClock(trainer.read), trainer.rollout_worker
    assert worker is not None
    trainer._sync_weight()
    worker.start()
    try:
        for _ in range(plan.warm_up + plan.steps):
            samples = [_sample(worker) for _ in range(plan.completions)]
            worker.groups_finished({sample.group_id for sample in samples})
            trainer._sync_weight()
            clock.on_step_end()
    finally:
        worker.stop()
    return clock


def _sample(worker: RolloutWorker) -> MoeRolloutSample:
    while True:
        try:
            return worker.rollout_buffer.get(timeout=1.0)
        except queue.Empty:
            worker.check_health(_STALE_AFTER_S)


def _options(plan: Plan, output_dir: str) -> dict[str, Any]:
    """What both sides have in common."""
    return {
        "output_dir": output_dir,
        "max_steps": plan.warm_up + plan.steps,
        "per_device_train_batch_size": plan.completions,
        "num_generations": plan.num_generations,
        "max_completion_length": plan.completion_length,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "model_init_kwargs": {"dtype": "float32"},
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }
