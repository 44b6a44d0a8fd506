"""A run of half an hour: memory of trainer and generator stays flat, nothing piles up, and nothing is left at the end.

`SOAK_MINUTES` makes it shorter or longer.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import TrainerCallback

from tests.grpo.trainer_runs import HOSTS_NOTES, MODEL, PROMPTS, reward, settings
from trl_moe_ext import AsyncMoeGRPOTrainer, MoeLoraConfig

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(note) for note in HOSTS_NOTES)]

MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
# What is loaded, compiled and cached early does not count.
WARM_UP = 0.2


class Watch(TrainerCallback):
    """Ends the run when its time is over; kills the generator once in the middle of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.began = folder, time.monotonic()
        self.rows: list[tuple[float, int, int, int, int]] = []
        self.worker = None
        self.killed: int | None = None

    @property
    def share(self) -> float:
        """Of the run that is over."""
        return (time.monotonic() - self.began) / (60 * MINUTES)

    def on_step_end(self, args, state, control, **kwargs):
        if self.share >= 1:
            control.should_training_stop = True
        here = psutil.Process()
        pid = json.loads((self.folder / "rollout.json").read_text())["pid"]
        if pid is None or not psutil.pid_exists(pid):
            return
        generator = psutil.Process(pid)
        buffer = self.worker.rollout_buffer
        sizes = here.memory_info().rss, generator.memory_info().rss, here.num_threads(), buffer.qsize()
        self.rows.append((self.share, *sizes))
        if self.killed is None and self.share > 0.5:
            self.killed = pid
            generator.kill()


def assert_flat(name: str, shares: np.ndarray, sizes: np.ndarray, limit: float) -> None:
    """Growth over the whole run, by the straight line that fits best, is below this share of the size."""
    mean, growth = sizes.mean(), float(np.polyfit(shares, sizes, 1)[0])
    print(f"{name}: {mean / 2**20:.0f} MiB, growing by {growth / 2**20:+.1f} MiB a run")
    assert growth < limit * mean


def test_memory_stays_flat(tmp_path):
    watch = Watch(tmp_path)
    args = settings(
        tmp_path,
        max_steps=10**9,
        learning_rate=1e-5,
        save_strategy="steps",
        save_steps=200,
        save_total_limit=1,
        logging_steps=20,
        max_completion_length=16,
        routing_replay=True,
    )
    trainer = AsyncMoeGRPOTrainer(str(MODEL), reward, args, PROMPTS, peft_config=MoeLoraConfig(r=4), callbacks=[watch])
    watch.worker = trainer.rollout_worker
    trainer.train()

    share, trainer_rss, generator_rss, threads, queued = (np.array(column) for column in zip(*watch.rows, strict=True))
    settled = share > WARM_UP
    assert settled.sum() > 20
    print(
        f"{trainer.state.global_step} steps in {MINUTES:g} min, at most {threads.max()} threads, {queued.max()} queued"
    )
    # The second life of the generator begins afresh; each is flat by itself.
    assert_flat("trainer", share[settled], trainer_rss[settled], 0.03)
    for name, life in (("first", settled & (share < 0.5)), ("second", share > 0.6)):
        assert_flat(f"generator, {name} life", share[life], generator_rss[life], 0.1)
    assert threads[settled].max() <= threads[settled].min() + 2
    assert queued.max() <= (args.max_staleness + 2) * 8
    last = json.loads((tmp_path / "rollout.json").read_text())
    assert last["restarts"] == 1
    assert last["state"] == "stopped"
    assert not psutil.Process().children()
