"""What happens between the steps of an async GRPO run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from trl_moe_ext.grpo.trainer import AsyncMoeGRPOTrainer

__all__ = ["RolloutCallback"]


class RolloutCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the rollout worker what was trained on, and ends the run after a signal."""

    def __init__(self, trainer: AsyncMoeGRPOTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prompts that are left out count towards the epochs, by which TRL's own callback ends the run."""
        self._trainer.count_skipped_groups()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The groups of the step are done; after a signal, in whatever process, this was the last step."""
        self._trainer.finish_groups()
        if self._trainer.is_interrupted():
            control.should_training_stop = control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the completions since the last log."""
        self._trainer.completions.flush(state.global_step)
