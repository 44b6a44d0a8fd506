"""TRL's async GRPO trainer for adapters of MoE models: with a generator of its own, which only the adapter travels to.

The loop, the packing and the loss without a correction are TRL's, called and never copied. What is put in: the rollout
worker and the sync of the adapter; the weights of importance sampling; the routes of the generator; micro-batches that
are taken no sooner than they are trained on; checkpoints that know which prompts are done; and an orderly end.

Here are the set-up, the sync of the adapter and the run. `loss.trained_policy`, `batches.trained_samples` and
`checkpointing` hold the other parts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.arguments import check_arguments, groups_per_step, reward_functions
from trl_moe_ext.grpo.backend_setup import make_backend
from trl_moe_ext.grpo.backends.protocol import RolloutBackend
from trl_moe_ext.grpo.batches.trained_samples import TrainedSamples
from trl_moe_ext.grpo.callback import RolloutCallback
from trl_moe_ext.grpo.checkpoint import check_unused, last_whole_checkpoint
from trl_moe_ext.grpo.checkpointing import CheckpointedRun
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.cpu_threads import shared_cores
from trl_moe_ext.grpo.loss.trained_policy import TrainedPolicy
from trl_moe_ext.grpo.rollout.sample_queue import StopRequested
from trl_moe_ext.grpo.rollout.worker import RolloutWorker
from trl_moe_ext.grpo.signals import Interruption
from trl_moe_ext.grpo.stand_ins import NoWeightTransfer, WorkerToCome
from trl_moe_ext.grpo.timeline import TRAINER, Timeline
from trl_moe_ext.grpo.timeline_plot import save_timeline
from trl_moe_ext.grpo.travelling import adapter_tensors, check_all_travels
from trl_moe_ext.reporting.record_callback import RunRecordCallback
from trl_moe_ext.tuners.settled import settled

__all__ = ["AsyncMoeGRPOTrainer"]


class AsyncMoeGRPOTrainer(CheckpointedRun, TrainedSamples, TrainedPolicy):
    """GRPO that generates while it trains.

    On a CPU with the `local` backend, trainer and generator share the cores: while it trains, PyTorch has
    `args.rollout_num_threads` fewer threads than there are cores. With a `rollout_backend` of the caller's it
    keeps them all.

    SIGTERM and Ctrl-C end the run after the step, or at once if it waits for samples, with a checkpoint; then
    `SystemExit` with the code 143 or `KeyboardInterrupt` is raised.

    Args:
        model: path or name of a repository; the generator loads it too.
        reward_funcs: one function or several, as for TRL's trainers; they run in threads of this process by default.
        args: options; those of `AsyncMoeGRPOConfig`.
        train_dataset: with a column ``prompt``; all other columns are handed to the reward functions.
        processing_class: the tokenizer; that of the model by default.
        peft_config: of the adapter that is trained.
        rollout_backend: where completions come from, in the place of the one that `args.rollout_backend` names.
        tools: refused, as is `environment_factory`: they need TRL's own trainer.

    Raises:
        ConfigError: an argument or option can't be served.
        LayoutError: routes are to be replayed in a model where they can't be.
        ValueError: TRL refuses the model, for attention sinks or layers that are recurrent.
    """

    args: AsyncMoeGRPOConfig
    rollout_worker: RolloutWorker | None
    model_version: int
    control: Any

    def __init__(
        self,
        model: str | os.PathLike[str],
        reward_funcs: Callable[..., Any] | list[Callable[..., Any]] | None = None,
        args: AsyncMoeGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
        rollout_backend: RolloutBackend | None = None,
        tools: Any = None,
        environment_factory: Any = None,
    ) -> None:
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if args is None:
            args = AsyncMoeGRPOConfig(f"{str(model).split('/')[-1]}-AsyncMoeGRPO")
        unserved = {"tools": tools, "environment_factory": environment_factory}
        check_arguments(model, args, train_dataset, peft_config, rollout_backend, unserved)
        rewards = reward_functions(reward_funcs, args)
        # By name: hosts stand above this room.
        import_module("trl_moe_ext.hosts.trl_async_grpo").install()
        super().__init__(
            model,
            rewards,
            args,
            train_dataset,
            processing_class,
            callbacks,
            optimizers,
            peft_config,
            rollout_worker=WorkerToCome(),
            weight_transfer=NoWeightTransfer(),
        )
        self.timeline = Timeline()
        self._interruption = Interruption(self._end_wait)
        self._has_own_backend = rollout_backend is not None
        self._has_trained = False
        check_all_travels(self._policy, self._adapter_name)
        self._set_up_loss()
        self._set_up_samples()
        self._set_up_checkpoints()
        self.rollout_worker = self._make_worker(rollout_backend, rewards, model)
        self.rollout_queue = None if self.rollout_worker is None else self.rollout_worker.rollout_buffer
        self.add_callback(RolloutCallback(self))
        if not any(isinstance(callback, RunRecordCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(RunRecordCallback)

    @property
    def _policy(self) -> PeftModel:
        return self.accelerator.unwrap_model(self.model)

    def _make_worker(
        self, backend: RolloutBackend | None, rewards: list[Callable[..., Any]], model_path: str
    ) -> RolloutWorker | None:
        """Only the main process has one."""
        if not self.accelerator.is_main_process:
            return None
        return RolloutWorker(
            backend
            or make_backend(
                self.args,
                model_path=model_path,
                # A generator that is started again must not choose other experts, or miss the profile.
                peft_config=settled(self._policy.peft_config[self._adapter_name]),
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.processing_class.pad_token_id,
            ),
            dataset=self.train_dataset,
            reward_funcs=rewards,
            tokenizer=self.processing_class,
            args=self.args,
            groups_per_step=groups_per_step(self.args),
            timeline=self.timeline,
            max_length=getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        )

    def _sync_weight(self) -> None:
        """Publish the adapter, and nothing else; the generator takes it while training goes on."""
        began = time.perf_counter()
        self.timeline.mark(TRAINER, "sync")
        tensors = adapter_tensors(self._policy, self._adapter_name)
        self.model_version = self._first_version if self._synced_at is None else self.model_version + 1
        self._synced_at = self.state.global_step
        if self.rollout_worker is not None:
            self.rollout_worker.publish(AdapterSnapshot(self.model_version, tensors))
        self.timeline.mark(TRAINER, "training")
        self._metrics["train"]["perf/weight_sync_s"].append(time.perf_counter() - began)

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **kwargs: Any) -> Any:
        """As in the parent; the generator runs meanwhile, and whatever happens, none is left.

        Args:
            resume_from_checkpoint: a folder, or True for the newest checkpoint that was written to its end.

        Raises:
            ConfigError: the checkpoint is of another run, or there is none; or the run is to begin anew, and
                `output_dir` holds the checkpoint of another one.
            KeyboardInterrupt: the run was stopped by Ctrl-C.
            SystemExit: it was stopped by SIGTERM.
        """
        if self._has_trained:
            raise MoeExtError("train was called before; make a new trainer, and resume from the last checkpoint")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole_checkpoint(Path(self.args.output_dir)))
        if not resume_from_checkpoint:
            check_unused(Path(self.args.output_dir))
        self._has_trained = True
        result = None
        cores = nullcontext() if self._has_own_backend else shared_cores(self.args, self.accelerator)
        with self._interruption, cores:
            try:
                result = super().train(resume_from_checkpoint, *others, **kwargs)
            except StopRequested:
                self._interruption.take_over()
            finally:
                if self.rollout_worker is not None:
                    self.rollout_worker.stop()
                    save_timeline(self.timeline, self.args.output_dir)
        self._interruption.end_process()
        return result

    def _end_wait(self) -> None:
        if self.rollout_worker is not None:
            self.rollout_worker.request_stop()

    def is_interrupted(self) -> bool:
        """Whether a signal has come to any of the processes, which all call this."""
        found = self._anywhere(self._interruption.signal is not None)
        if found:
            self._interruption.take_over()
        return found

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so in any of the processes."""
        return bool(self._total(torch.tensor(int(here), device=self.accelerator.device)).item())

    def _total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        summed: Tensor = self.accelerator.reduce(tensor, "sum")
        return summed
