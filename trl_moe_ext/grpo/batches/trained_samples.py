"""The samples of the async GRPO trainer: taken no sooner than they are trained on, and counted by prompt."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from trl_moe_ext.grpo.batches.micro_batches import MicroBatches, TokenBudgetPlanner
from trl_moe_ext.grpo.batches.packing import RolloutCollator, sample_of, samples_of
from trl_moe_ext.grpo.batches.returnable_queue import ReturnableQueue
from trl_moe_ext.grpo.completions import CompletionsTable
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.rollout.worker import RolloutWorker
from trl_moe_ext.grpo.trl_async import (
    AsyncGRPOTrainer,
    FixedCountBatcher,
    RolloutQueueDataset,
    TreeRow,
    trainer_module,
)

__all__ = ["TrainedSamples"]


class TrainedSamples(AsyncGRPOTrainer):  # type: ignore[misc]
    """The part of `AsyncMoeGRPOTrainer` that is between the queue of samples and a micro-batch."""

    args: AsyncMoeGRPOConfig
    rollout_worker: RolloutWorker | None
    model_version: int
    completions: CompletionsTable
    _given_samples: Counter[int]

    def _set_up_samples(self) -> None:
        """To be called when TRL's constructor has returned."""
        self.completions = CompletionsTable(self.args.output_dir, self.processing_class, self.args)
        # Samples of each group that were handed to steps; a group leaves it when all of them were trained on.
        self._given_samples = Counter()
        if self._epoch_stop_groups is not None:
            # It counts groups of the next epoch too, which may be trained on before the last of this one.
            self.remove_callback(trainer_module._EpochStopCallback)

    def get_train_dataloader(self) -> MicroBatches:
        """What TRL makes micro-batches of, without a loader that takes them before they are asked for."""
        processes, budget = self.accelerator.num_processes, max(self.args.token_budget or 0, 0)
        collate = RolloutCollator(
            self.processing_class.pad_token_id,
            processes,
            groups_trained=self._trained_groups,
            metrics=self._metrics["train"],
            token_budget=budget,
            slots=self._step_replay.slots,
            needs_routes=self.args.routing_replay,
        )
        plan = None if self.rollout_worker is None else self._plan(self.rollout_worker, processes, budget)
        return MicroBatches(self.accelerator, plan, collate, self._interruption.check, self._note)

    def _plan(self, worker: RolloutWorker, processes: int, budget: int) -> Any:
        queue = ReturnableQueue(worker.rollout_buffer, self.args.num_generations)
        self._rollout_dataset = self._samples_of(queue, worker)
        size = self.args.per_device_train_batch_size * processes
        if not budget:
            return FixedCountBatcher(self._rollout_dataset, processes, size)
        return TokenBudgetPlanner(
            self._rollout_dataset, processes, budget, size, put_back=lambda entry: queue.put_back(sample_of(entry))
        )

    def _samples_of(self, queue: ReturnableQueue, worker: RolloutWorker) -> Any:
        return RolloutQueueDataset(
            rollout_queue=queue,
            model_version_fn=lambda: self.model_version,
            check_health_fn=worker.check_health,
            stale_after_s=self.args.heartbeat_stale_after_s,
            metrics=self._metrics["train"],
            # The queue drops whole groups, before their first sample. Here single ones would be lost: a step may end
            # in the midst of a group, whose other samples are then one version older than when it was begun.
            max_staleness=sys.maxsize,
            report_to=self.args.report_to,
        )

    def _note(self, rows: list[TreeRow]) -> None:
        for sample in samples_of(rows):
            self._given_samples[int(sample.group_id)] += 1
            self.completions.add(sample, self.model_version)

    def finish_groups(self) -> None:
        """Tell the worker which groups have been trained on to their last sample, now that a step is complete."""
        if self.rollout_worker is not None:
            done = sorted(group for group, n in self._given_samples.items() if n == self.args.num_generations)
            self.rollout_worker.groups_finished(done)
            for group in done:
                del self._given_samples[group]

    def are_epochs_over(self) -> bool:
        """Whether every prompt of all epochs is done, if it is they that end the run; all processes call this."""
        if self._epoch_stop_groups is None:
            return False
        worker = self.rollout_worker
        found: bool = self._anywhere(worker is not None and worker.state()["first_undone"] >= self._epoch_stop_groups)
        return found
