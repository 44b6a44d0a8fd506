"""What happens between the steps of an async GRPO run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

if TYPE_CHECKING:
    from trl_moe_ext.grpo.trainer import AsyncMoeGRPOTrainer

__all__ = ["RolloutCallback"]


class RolloutCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the rollout worker what was trained on, and ends the run after its epochs or a signal."""

    def __init__(self, trainer: AsyncMoeGRPOTrainer) -> None:
        self._trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The groups of the step are done; after a signal, in whatever process, this was the last step."""
        self._trainer.finish_groups()
        if self._trainer.are_epochs_over():
            control.should_training_stop = True
            # transformers saves at the end of max_steps only.
            control.should_save = control.should_save or args.save_strategy == SaveStrategy.STEPS
        if self._trainer.is_interrupted():
            control.should_training_stop = control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the completions since the last log."""
        self._trainer.completions.flush(state.global_step)
