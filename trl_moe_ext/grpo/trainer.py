"""TRL's async GRPO trainer for adapters of MoE models: with a generator of its own, which only the adapter travels to.

The loop, the packing and the loss without a correction are TRL's, called and never copied. What is put in: the rollout
worker and the sync of the adapter; the weights of importance sampling; the routes of the generator; micro-batches that
are taken no sooner than they are trained on; checkpoints that know which prompts are done; and an orderly end.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.arguments import check_arguments, groups_per_step, reward_functions
from trl_moe_ext.grpo.backend_setup import make_backend
from trl_moe_ext.grpo.backends.protocol import RolloutBackend
from trl_moe_ext.grpo.batches.micro_batches import MicroBatches, TokenBudgetPlanner
from trl_moe_ext.grpo.batches.packing import PackedRow, RolloutCollator, made_up_batch, samples_of
from trl_moe_ext.grpo.callback import RolloutCallback
from trl_moe_ext.grpo.checkpoint import RolloutState, last_whole_checkpoint
from trl_moe_ext.grpo.completions import CompletionsTable
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.cpu_threads import threads_of_trainer
from trl_moe_ext.grpo.loss.objective import mean_of_step, policy_loss
from trl_moe_ext.grpo.loss.policy_meter import PolicyMeter
from trl_moe_ext.grpo.loss.step_replay import StepReplay
from trl_moe_ext.grpo.rollout.sample_queue import StopRequested
from trl_moe_ext.grpo.rollout.worker import RolloutWorker
from trl_moe_ext.grpo.signals import Interruption
from trl_moe_ext.grpo.stand_ins import NoWeightTransfer, WorkerToCome
from trl_moe_ext.grpo.timeline import TRAINER, Timeline
from trl_moe_ext.grpo.timeline_plot import save_timeline
from trl_moe_ext.grpo.travelling import adapter_tensors, check_all_travels
from trl_moe_ext.grpo.trl_async import (
    AsyncGRPOTrainer,
    FixedCountBatcher,
    RolloutQueueDataset,
    TreeRow,
)
from trl_moe_ext.reporting.record_callback import RunRecordCallback
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.sft.trained_router import router_parameters

__all__ = ["AsyncMoeGRPOTrainer"]

_PROBE_TOKENS = 8


class AsyncMoeGRPOTrainer(AsyncGRPOTrainer):  # type: ignore[misc]
    """GRPO that generates while it trains.

    On a CPU with the `local` backend, trainer and generator share the cores: while it trains, PyTorch has
    `args.rollout_num_threads` fewer threads than there are cores.

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
        model: str,
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
        if args is None:
            args = AsyncMoeGRPOConfig(f"{str(model).split('/')[-1]}-AsyncMoeGRPO")
        unserved = {"tools": tools, "environment_factory": environment_factory}
        check_arguments(model, args, train_dataset, peft_config, rollout_backend, unserved)
        rewards = reward_functions(reward_funcs)
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
        self._correction = args.correction
        self._meter = PolicyMeter(self.accelerator.gather)
        self._given_groups: set[int] = set()
        self._first_version = 0
        self._synced_at: int | None = None
        self._saved_at: int | None = None
        self._has_trained = False
        check_all_travels(self._policy, self._adapter_name)
        self._settle_auxiliary_loss()
        self._step_replay = StepReplay(self._policy, args.routing_replay, self._total)
        self._check_replay()
        self.completions = CompletionsTable(args.output_dir, self.processing_class, args)
        self.rollout_worker = self._make_worker(rollout_backend, rewards, model, peft_config)
        self.rollout_queue = None if self.rollout_worker is None else self.rollout_worker.rollout_buffer
        self.add_callback(RolloutCallback(self))
        if not any(isinstance(callback, RunRecordCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(RunRecordCallback)

    # -- set-up ------------------------------------------------------------------------------------------------------

    @property
    def _policy(self) -> PeftModel:
        return self.accelerator.unwrap_model(self.model)

    def _make_worker(
        self, backend: RolloutBackend | None, rewards: list[Callable[..., Any]], model_path: str, peft_config: Any
    ) -> RolloutWorker | None:
        """Only the main process has one."""
        if not self.accelerator.is_main_process:
            return None
        return RolloutWorker(
            backend
            or make_backend(
                self.args,
                model_path=model_path,
                peft_config=peft_config,
                eos_token_ids=self.eos_token_ids,
                pad_token_id=self.processing_class.pad_token_id,
            ),
            dataset=self.train_dataset,
            reward_funcs=rewards,
            tokenizer=self.processing_class,
            args=self.args,
            groups_per_step=groups_per_step(self.args),
            timeline=self.timeline,
            output_dir=self.args.output_dir,
            max_length=getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
        )

    def _settle_auxiliary_loss(self) -> None:
        """Without a coefficient of the user's, balance is a matter of a router that is trained, as in `MoeSFTTrainer`.

        The coefficient of the model's config would otherwise pull at the adapters for the sake of a router that stays
        as it is.
        """
        if self.args.router_aux_loss_coef is None and not router_parameters(find_routers(self._policy)):
            self.aux_loss_enabled = False

    def _check_replay(self) -> None:
        """Refuse a model whose routes can't be replayed, by a forward of a few tokens."""
        if not self.args.routing_replay or self.is_fsdp_enabled:  # a model that is to be sharded can't run yet
            return
        batch = self._prepare_inputs(made_up_batch(_PROBE_TOKENS, self.processing_class.pad_token_id))
        was_training = self.model.training
        self.model.eval()
        with self.compute_loss_context_manager():
            self._step_replay.check(lambda: self._forward(self.model, PackedRow.of(batch)), _PROBE_TOKENS)
        self.model.train(was_training)

    # -- samples -----------------------------------------------------------------------------------------------------

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
        plan: Any = None
        if self.rollout_worker is not None:
            self._rollout_dataset = RolloutQueueDataset(
                rollout_queue=self.rollout_worker.rollout_buffer,
                model_version_fn=lambda: self.model_version,
                check_health_fn=self.rollout_worker.check_health,
                stale_after_s=self.args.heartbeat_stale_after_s,
                metrics=self._metrics["train"],
                max_staleness=self.args.max_staleness,
                report_to=self.args.report_to,
            )
            size = self.args.per_device_train_batch_size * processes
            if budget:
                plan = TokenBudgetPlanner(self._rollout_dataset, processes, budget, size)
            else:
                plan = FixedCountBatcher(self._rollout_dataset, processes, size)
        return MicroBatches(self.accelerator, plan, collate, self._interruption.check, self._note)

    def _note(self, rows: list[TreeRow]) -> None:
        for sample in samples_of(rows):
            self._given_groups.add(int(sample.group_id))
            self.completions.add(sample, self.model_version)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """As in the parent; if there are no more, a checkpoint is written first."""
        try:
            found: tuple[list[Any], Any] = super().get_batch_samples(epoch_iterator, num_batches, device)
        except StopRequested:
            self._save_between_steps()
            raise
        except MoeExtError:
            if self.state.global_step:  # else there is nothing to keep
                self._save_between_steps()
            raise
        return found

    def _save_between_steps(self) -> None:
        if self._saved_at != self.state.global_step:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def count_skipped_groups(self) -> None:
        """Count prompts that are left out for good as trained on."""
        if self.rollout_worker is not None:
            skipped = self.rollout_worker.skipped_groups() - self._trained_groups
            self._trained_groups |= skipped
            # Which the step at hand has not trained on.
            self._last_groups_trained += len(skipped)

    def finish_groups(self) -> None:
        """Tell the worker which groups the step has trained on."""
        if self.rollout_worker is not None:
            self.rollout_worker.groups_finished(sorted(self._given_groups))
            self._given_groups.clear()

    # -- the adapter -------------------------------------------------------------------------------------------------

    def _sync_weight(self) -> None:
        """Publish the adapter, and nothing else; the generator takes it while training goes on."""
        began = time.perf_counter()
        self.timeline.mark(TRAINER, "sync")
        tensors = adapter_tensors(self._policy, self._adapter_name)
        self.model_version = self._first_version if self._synced_at is None else self.model_version + 1
        self._synced_at = self.state.global_step
        if self.rollout_worker is not None:
            self.rollout_worker.publish(AdapterSnapshot(self.model_version, tensors))
            self.rollout_worker.update_model_version(self.model_version)
        self.timeline.mark(TRAINER, "training")
        self._metrics["train"]["perf/weight_sync_s"].append(time.perf_counter() - began)

    # -- a step ------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in the parent; recorded routes hold until its backward pass is over."""
        with self._step_replay.around(inputs, self.accelerator.device):
            batch = {name: value for name, value in inputs.items() if name != "routes"}
            loss: Tensor = super().training_step(model, batch, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The parent's loss without a correction, else that of `objective`."""
        if self._correction is None:
            plain: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return plain
        row = PackedRow.of(inputs)
        began = time.perf_counter()
        outputs = self._forward(model, row)
        self._last_forward_time_s = time.perf_counter() - began
        log_probs, entropy = (values.flatten()[row.token_index] for values in (outputs.log_probs, outputs.entropy))
        everything = torch.ones_like(log_probs, dtype=torch.bool)
        corrected = self._correction.correct(log_probs, row.old_log_probs, everything, row.sequence)
        loss = mean_of_step(
            policy_loss(log_probs, row.advantages, corrected),
            inputs["global_n_tokens"][0],
            self.accelerator.num_processes,
            self.current_gradient_accumulation_steps,
        )
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
            mean = self.accelerator.reduce(outputs.aux_loss.detach().float(), "mean")
            self._metrics["train"]["aux_loss"].append(mean.item())
        self._meter.add(log_probs.detach(), row.old_log_probs, entropy.detach(), corrected.statistics)
        self._account(inputs)
        return loss

    def _forward(self, model: nn.Module, row: PackedRow) -> Any:
        """Log-probabilities and entropies of the packed positions, by TRL's fused output layer."""
        wanted = {"output_router_logits": True} if self.aux_loss_enabled else {}
        return model(fused_lm_head=True, **wanted, **row.arguments)

    def _account(self, inputs: dict[str, Any]) -> None:
        """What the parent's `_log_step_metrics` makes its figures of, which its own loss adds up."""
        forwarded, mean_length = float(inputs["global_n_forward_tokens"][0]), float(inputs["mean_seq_len"][0])
        self._step_forward_tokens += forwarded
        self._step_trained_tokens += float(inputs["global_n_tokens"][0])
        self._step_seq_len_weighted += mean_length * forwarded
        self._step_samples += forwarded / mean_length
        self._step_forward_s += self._last_forward_time_s

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the parent, with the statistics of the weights and of the routes."""
        for name, value in (self._meter.take() | self._step_replay.take_metrics()).items():
            self._metrics["train"][name].append(value)
        super().log(logs, start_time)

    # -- the run -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *others: Any, **kwargs: Any) -> Any:
        """As in the parent; the generator runs meanwhile, and whatever happens, none is left.

        Args:
            resume_from_checkpoint: a folder, or True for the newest checkpoint that was written to its end.

        Raises:
            ConfigError: the checkpoint is of another run, or there is none.
            KeyboardInterrupt: the run was stopped by Ctrl-C.
            SystemExit: it was stopped by SIGTERM.
        """
        if self._has_trained:
            raise MoeExtError("train was called before; make a new trainer, and resume from the last checkpoint")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole_checkpoint(Path(self.args.output_dir)))
        self._has_trained = True
        result = None
        with self._interruption, self._shared_cores():
            try:
                result = super().train(resume_from_checkpoint, *others, **kwargs)
            except StopRequested:
                # Another process may have had the signal.
                self._interruption.signal = self._interruption.signal or signal.SIGTERM
            finally:
                if self.rollout_worker is not None:
                    self.rollout_worker.stop()
                    save_timeline(self.timeline, self.args.output_dir)
        self._interruption.end_process()
        return result

    def _shared_cores(self) -> AbstractContextManager[None]:
        generates_here = self.args.rollout_backend == "local" and self.args.rollout_device in ("auto", "cpu")
        if not generates_here or torch.cuda.is_available() or self.accelerator.device.type != "cpu":
            return nullcontext()
        return threads_of_trainer(self.args.rollout_num_threads, self.accelerator.num_processes)

    def _end_wait(self) -> None:
        if self.rollout_worker is not None:
            self.rollout_worker.request_stop()

    def is_interrupted(self) -> bool:
        """Whether a signal has come to any of the processes, which all call this."""
        here = self._interruption.signal is not None
        return bool(self._total(torch.tensor(int(here), device=self.accelerator.device)).item())

    def _total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        summed: Tensor = self.accelerator.reduce(tensor, "sum")
        return summed

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.rollout_worker is not None:
            state = RolloutState(
                model_version=self.model_version,
                is_published=self._synced_at == self.state.global_step,
                worker=self.rollout_worker.state(),
            )
            state.save(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)
        self._saved_at = self.state.global_step

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint is not None:
            state = RolloutState.load(Path(checkpoint))
            # A version names the same weights in all of a run.
            self._first_version = state.model_version + (not state.is_published)
            self._groups_before_resume = state.worker["num_done"]
            if self.rollout_worker is not None:
                self.rollout_worker.restore(state.worker)
        return super()._inner_training_loop(*args, **kwargs)
