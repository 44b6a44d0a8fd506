"""Keeps the record of a run while it trains, so that a killed run has one too."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.reporting import run_facts
from trl_moe_ext.reporting.adapted import adapted_parts
from trl_moe_ext.reporting.run_record import RECORD_FILE, Mark, RunRecord, Session, TrainedPart
from trl_moe_ext.router.history import HISTORY_FILE

__all__ = ["RunRecorder"]

_INTERVAL = 10.0  # seconds between two writes
_COST = 0.01  # of the time may go into writing, where a long history makes it slow


class RunRecorder:
    """The record of the run that begins now, or of the one that goes on.

    Args:
        args: of the trainer.
        state: at the start of training. A step above 0 means that the run goes on from a checkpoint: what the record
            in the output directory tells of the steps before is kept.
        model: with its adapters.
    """

    def __init__(self, args: Any, state: TrainerState, model: nn.Module) -> None:
        self.directory = Path(args.output_dir)
        if state.global_step == 0:
            # An earlier run in the same place may have had a router, and this one none.
            (self.directory / HISTORY_FILE).unlink(missing_ok=True)
        self.record = _earlier(self.directory, state.global_step)
        self._describe(args, model)
        last = self.record.marks[-1] if self.record.marks else Mark(state.global_step, 0.0, 0)
        self._seconds, self._tokens = last.seconds, last.tokens  # up to this process
        self._initial_tokens = state.num_input_tokens_seen
        self._first_row = len(state.log_history)
        self._begun = time.monotonic()
        self._next_write = 0.0
        self._session = Session(_now(), _now(), state.global_step)
        self.record.sessions.append(self._session)
        self.record.marks.append(Mark(state.global_step, self._seconds, self._tokens))

    def on_log(self, state: TrainerState) -> None:
        """Note how far the run is; written at most every ten seconds, after training at once."""
        if self.record.is_finished:  # an evaluation that the user asked for: its row counts, the time between does not
            self.record.log_history = state.log_history
        else:
            self._mark(state)
        if self.record.is_finished or time.monotonic() >= self._next_write:
            self._write()

    def on_save(self, state: TrainerState) -> None:
        """Note a checkpoint and write: a process that goes on from it finds the record of it."""
        self._mark(state)
        self._write()

    def on_train_end(self, state: TrainerState) -> None:
        """The last mark of the run."""
        self._mark(state)
        self.record.is_finished = True
        self._write()

    def _describe(self, args: Any, model: nn.Module) -> None:
        self.record.adapted = [TrainedPart(**asdict(part)) for part in adapted_parts(model)]
        self.record.total_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.record.model = run_facts.model_name(model)
        self.record.settings = run_facts.settings(model, args)
        self.record.versions = run_facts.versions()
        self.record.machine = run_facts.machine(int(getattr(args, "world_size", 1)))
        self.record.memory = run_facts.memory()

    def _mark(self, state: TrainerState) -> None:
        seconds = self._seconds + time.monotonic() - self._begun
        tokens = self._tokens + self._tokens_since_start(state)
        self.record.marks.append(Mark(state.global_step, round(seconds, 3), tokens))
        self.record.log_history = state.log_history
        self.record.max_steps = state.max_steps

    def _tokens_since_start(self, state: TrainerState) -> int:
        """Tokens that this process has trained on.

        The count of the state goes on after a resume; that of TRL's SFT, in the logs, starts again at 0.
        """
        counted = state.num_input_tokens_seen - self._initial_tokens
        if counted or self._initial_tokens:
            return int(counted)
        rows = reversed(state.log_history[self._first_row :])
        return int(next((row["num_tokens"] for row in rows if row.get("num_tokens") is not None), 0))

    def _write(self) -> None:
        began = time.monotonic()
        self._session.ended = _now()
        for device, held in run_facts.peak_memory().items():
            self.record.peak_memory[device] = max(held, self.record.peak_memory.get(device, 0))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.record.save(self.directory)
        except OSError as error:  # no reason to lose a run
            warnings.warn(f"{self.directory / RECORD_FILE} was not written: {error}", RuntimeWarning, stacklevel=2)
        now = time.monotonic()
        self._next_write = now + max(_INTERVAL, (now - began) / _COST)


def _earlier(directory: Path, step: int) -> RunRecord:
    """The record of the steps up to `step`, empty for a new run and where there is none that can be read."""
    file = directory / RECORD_FILE
    if step == 0 or not file.is_file():
        return RunRecord()
    try:
        record = RunRecord.load(file)
    except ConfigError as error:
        warnings.warn(f"The report will lack what was before step {step}: {error}", RuntimeWarning, stacklevel=2)
        return RunRecord()
    record.resume_at(step)
    return record


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
