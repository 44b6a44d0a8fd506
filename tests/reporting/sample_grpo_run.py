"""A run of asynchronous GRPO as it is on disk, without training: for the report."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from trl_moe_ext.grpo.timeline import GENERATOR, REWARDS, TRAINER, Span
from trl_moe_ext.grpo.timeline_file import TimelineRecord
from trl_moe_ext.grpo.timeline_plot import save_timeline_plot
from trl_moe_ext.reporting.rollout_files import COMPLETIONS_DIR, TIMELINE_PICTURE
from trl_moe_ext.reporting.run_record import Mark, RunRecord, Session, TrainedPart

STEPS = 60


def row(step: int, noise: random.Random) -> dict[str, float]:
    """What is logged at a step."""
    return {
        "step": step,
        "loss": noise.gauss(0, 1e-3),
        "grad_norm": 0.3,
        "learning_rate": 1e-4,
        "reward": 0.9 - 0.6 * math.exp(-step / 20) + noise.gauss(0, 0.03),
        "reward_std": 0.4 * math.exp(-step / 60),
        "rewards/exact_answer": 0.8 - 0.6 * math.exp(-step / 20) + noise.gauss(0, 0.03),
        "rewards/brief": 0.1 + step * 1e-4,
        "reward/raised_total": float(step in (10, 20, 30)),
        "reward/timeout_total": float(step == 40),
        "reward/invalid_total": 0.0,
        "rollout/zero_advantage_total": float(step > 30),
        "rollout/restarts_total": float(step == 25),
        "rollout/stale_total": float(step in (26, 27)),
        "rollout/queue_size": 8 + noise.randrange(8),
        "rollout/generated_tok_s": 850 + noise.gauss(0, 20),
        "trainer/wait_frac": 0.2 + noise.gauss(0, 0.02),
        "generator/idle_frac": 0.05,
        "sync/seconds": 0.04 + noise.random() * 0.01,
        "sync/bytes": 4_200_000.0,
        "lag/0": 0.1,
        "lag/1": 0.6,
        "lag/2": 0.3,
        "lag/3": 0.0,
        "completions/mean_length": 12.0,
        "completions/clipped_frac": 0.02,
        "importance/ess_share": 0.97,
        "importance/kl_k3": 1e-3,
        "importance/ratio_mean": 1.001,
        "importance/limited_share": 2e-4,
        "router/replay_mismatch": 0.04,
        "router/replay_mismatch_any": 0.11,
        "entropy": 1.2 - step / 100,
    }


def completion(step: int, advantage: float, text: str = "The answer is 42.<|im_end|>") -> dict[str, Any]:
    return {
        "step": step,
        "prompt": "<|im_start|>user\nWhat is 19 + 23?<|im_end|>\n<|im_start|>assistant\n",
        "completion": text,
        "exact_answer": float(advantage > 0),
        "brief": None,
        "advantage": advantage,
        "model_version": step - 1,
        "lag": 1,
    }


def write_completions(directory: Path, step: int, rows: list[dict[str, Any]]) -> Path:
    path = directory / COMPLETIONS_DIR / f"completions_{step:05d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def timeline(steps: int = STEPS) -> TimelineRecord:
    """Steps of a second; the generator is a little slower than the trainer."""
    spans = []
    for step in range(steps):
        spans += [
            Span(TRAINER, "waiting", step, step + 0.2),
            Span(TRAINER, "training", step + 0.2, step + 0.95),
            Span(TRAINER, "sync", step + 0.95, step + 1.0),
            Span(GENERATOR, "loading", step, step + 0.04),
            Span(GENERATOR, "generating", step + 0.04, step + 0.95),
            Span(GENERATOR, "idle", step + 0.95, step + 1.0),
            Span(REWARDS, "scoring", step + 0.5, step + 0.7),
            Span(REWARDS, "idle", step + 0.7, step + 1.5),
        ]
    seconds = {
        TRAINER: {"waiting": 0.2 * steps, "training": 0.75 * steps, "sync": 0.05 * steps},
        GENERATOR: {"loading": 0.04 * steps, "generating": 0.91 * steps, "idle": 0.05 * steps},
        REWARDS: {"scoring": 0.2 * steps, "idle": 0.8 * steps},
    }
    return TimelineRecord(tuple(spans), seconds)


def write_grpo_run(directory: Path) -> Path:
    """A finished run of 60 steps with a timeline and completions of three logs."""
    directory.mkdir(parents=True, exist_ok=True)
    noise = random.Random(0)
    record = RunRecord(
        log_history=[row(step, noise) for step in range(1, STEPS + 1)],
        marks=[Mark(step, float(step), 0) for step in range(STEPS + 1)],
        sessions=[Session("2026-03-04T09:00:00+00:00", "2026-03-04T09:01:00+00:00", 0)],
        peak_memory={"process": 900_000_000},
        memory={"process": 24_000_000_000},
        adapted=[TrainedPart("routed experts", 4, 900_000)],
        total_parameters=3_000_000,
        model={"name": "a policy", "class": "Qwen3MoeForCausalLM"},
        settings={"adapter": {"peft_type": "MOE_LORA", "r": 8}, "training": {"max_staleness": 3}},
        max_steps=STEPS,
        is_finished=True,
    )
    record.save(directory)
    save_timeline_plot(timeline(), directory / TIMELINE_PICTURE)
    for step in (1, 30, STEPS):
        advantages = [0.1 * (index - 4) for index in range(8)]
        write_completions(directory, step, [completion(step, advantage) for advantage in advantages])
    return directory
