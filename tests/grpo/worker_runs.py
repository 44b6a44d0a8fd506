"""Small runs of the rollout worker with a generator in memory and a trainer that only counts."""

from __future__ import annotations

import queue
import time
from collections import Counter, defaultdict

from datasets import Dataset

from tests.grpo.fakes import FakeBackend, FakeTokenizer, snapshot
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.rollout.worker import RolloutWorker
from trl_moe_ext.grpo.timeline import Timeline

NUM_GENERATIONS = 4


def by_index(completions, **kwargs):
    """Rewards that differ within a group."""
    return [float(index) for index in range(len(completions))]


def prompts(rows=12):
    return Dataset.from_dict({"prompt": [f"question {row}" for row in range(rows)], "answer": list(range(rows))})


def make_worker(tmp_path, backend=None, rewards=by_index, rows=12, groups_per_step=2, **options):
    options = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "num_generations": NUM_GENERATIONS,
        "max_completion_length": 8,
        "max_inflight_tasks": 16,
        "max_staleness": 2,
        **options,
    }
    dataset = options.pop("dataset", None) or prompts(rows)
    return RolloutWorker(
        backend or FakeBackend(),
        dataset=dataset,
        reward_funcs=rewards if isinstance(rewards, list) else [rewards],
        tokenizer=FakeTokenizer(),
        args=AsyncMoeGRPOConfig(**options),
        groups_per_step=groups_per_step,
        timeline=Timeline(),
    )


def get(worker, timeout=30.0):
    """The next sample as TRL waits for it: with a look at the worker's health now and then."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return worker.rollout_buffer.get(timeout=1.0)
        except queue.Empty:
            worker.check_health(60)
            assert time.monotonic() < deadline, "no sample came"


class Trainer:
    """Trains on whole groups, `groups_per_step` a step, and syncs after each step."""

    def __init__(self, worker, groups_per_step=2, version=1):
        self.worker, self.groups_per_step, self.version = worker, groups_per_step, version
        self.trained = []
        self.samples = []
        worker.publish(snapshot(version))
        worker.start()

    def step(self):
        samples = [get(self.worker) for _ in range(self.groups_per_step * NUM_GENERATIONS)]
        counts = Counter(sample.group_id for sample in samples)
        assert set(counts.values()) == {NUM_GENERATIONS}, "whole groups"
        self.samples += samples
        self.trained += list(counts)
        self.worker.groups_finished(counts)
        self.version += 1
        self.worker.publish(snapshot(self.version))
        return samples


def metrics_of(worker):
    """Everything that was pushed, by name."""
    found = defaultdict(list)
    while True:
        try:
            for name, value in worker.metrics_queue.get_nowait().items():
                found[name].append(value)
        except queue.Empty:
            return found


def wait_until(condition, timeout=30.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
