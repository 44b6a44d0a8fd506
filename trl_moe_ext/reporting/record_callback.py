"""The callback that keeps the record of a run, from which `trl-moe report` makes its page."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_moe_ext.reporting.run_recorder import RunRecorder


class RunRecordCallback(TrainerCallback):  # type: ignore[misc]
    """Writes ``moe_run.json`` into the output directory, on the main process only; prints nothing."""

    def __init__(self) -> None:
        self._recorder: RunRecorder | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Begin a record, or go on with that of the checkpoint."""
        self._recorder = RunRecorder(args, state, model) if state.is_world_process_zero else None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the record up to date."""
        if self._recorder is not None:
            self._recorder.on_log(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record beside the checkpoint, from which the run may go on."""
        if self._recorder is not None:
            self._recorder.on_save(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write that the run came to its end."""
        if self._recorder is not None:
            self._recorder.on_train_end(state)
