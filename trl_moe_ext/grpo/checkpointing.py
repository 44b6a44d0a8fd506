"""The checkpoints of the async GRPO trainer: written between two steps, and gone on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.grpo.checkpoint import RolloutState
from trl_moe_ext.grpo.rollout.sample_queue import StopRequested
from trl_moe_ext.grpo.rollout.worker import RolloutWorker
from trl_moe_ext.grpo.trl_async import AsyncGRPOTrainer, trainer_module

__all__ = ["CheckpointedRun"]


class CheckpointedRun(AsyncGRPOTrainer):  # type: ignore[misc]
    """The part of `AsyncMoeGRPOTrainer` that keeps the rollouts with the weights."""

    rollout_worker: RolloutWorker | None
    model_version: int
    control: Any
    _synced_at: int | None
    _first_version: int
    _saved: Path | None
    _is_complete: bool

    def _set_up_checkpoints(self) -> None:
        """To be called when TRL's constructor has returned."""
        self._synced_at = self._saved = None
        self._first_version = 0
        self._is_complete = False

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
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
        if self._saved != self._checkpoint_folder(trial=None):
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self._checkpoint_folder(trial)
        if self.rollout_worker is not None:
            state = RolloutState(
                model_version=self.model_version,
                is_published=self._synced_at == self.state.global_step,
                worker=self.rollout_worker.state(),
            )
            state.save(folder)
        super()._save_checkpoint(model, trial)
        self._saved = folder

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)).resolve() / f"checkpoint-{self.state.global_step}"

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = kwargs.get("resume_from_checkpoint")
        if checkpoint is not None:
            self._go_on_from(Path(checkpoint))
        return super()._inner_training_loop(*args, **kwargs)

    def _go_on_from(self, checkpoint: Path) -> None:
        state = RolloutState.load(checkpoint)
        # A version names the same weights in all of a run.
        self.model_version = state.model_version
        self._first_version = state.model_version + (not state.is_published)
        # Before the next step there is nothing to add to it, and writing it again could damage it.
        self._saved = checkpoint.resolve()
        if self.rollout_worker is not None:
            self.rollout_worker.restore(state.worker)
        steps = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
        target = self._epoch_stop_groups
        self._is_complete = steps >= self.args.max_steps or (
            target is not None and state.worker["first_undone"] >= target
        )
        if self._is_complete:
            # It would start the generator.
            self.remove_callback(trainer_module._TrainBeginCallback)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in the parent, which would train one step more after a checkpoint that is the end of its run."""
        if self._is_complete:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)
