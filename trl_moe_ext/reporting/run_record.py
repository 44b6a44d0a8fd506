"""What is known of a run, in one file of its output directory: the source of ``trl-moe report``."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.files import write_atomically

__all__ = ["RECORD_FILE", "Mark", "RunRecord", "Session", "TrainedPart"]

RECORD_FILE = "moe_run.json"
_FORMAT = 1


@dataclass(frozen=True)
class Mark:
    """How far a run was: seconds and tokens since its start, without what a resume has thrown away."""

    step: int
    seconds: float
    tokens: int


@dataclass(frozen=True)
class TrainedPart:
    """A row of the table of what is trained, as in `trl_moe_ext.reporting.adapted`, which needs the model."""

    part: str
    modules: int
    parameters: int
    detail: str = ""


@dataclass
class Session:
    """One process of a run: times in UTC, ISO 8601. A run that went on from a checkpoint has several."""

    started: str
    ended: str
    first_step: int


@dataclass
class RunRecord:
    """Everything of a run that the report shows, up to the last time it was written.

    Args:
        log_history: of `TrainerState`; values that are not finite are None.
        marks: at the start, at every log and at every checkpoint, of the steps that led to the weights at the end.
        sessions: the processes, in order.
        lost_seconds: spent on steps that were repeated after a resume.
        peak_memory: most bytes held, by device; ``process`` is the resident memory of the main process.
        memory: bytes that each of these devices has.
        adapted: `adapted_parts` of the model.
        total_parameters: of the model with its adapter.
        model: its ``name`` and ``class``.
        settings: group of options (``adapter``, ``router``, ``training``) -> name -> value.
        versions: of the libraries and of Python.
        machine: ``processor``, ``devices``, ``cores``, ``processes``, ``threads``.
        max_steps: planned number of steps.
        is_finished: whether training came to its end.
    """

    log_history: list[dict[str, Any]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    lost_seconds: float = 0.0
    peak_memory: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    adapted: list[TrainedPart] = field(default_factory=list)
    total_parameters: int = 0
    model: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 0
    is_finished: bool = False

    @property
    def step(self) -> int:
        """The last step that is known of."""
        return max([row["step"] for row in self.log_history] + [mark.step for mark in self.marks], default=0)

    @property
    def wall_seconds(self) -> float:
        """Time spent in training, evaluation and saving, repeated steps included."""
        return (self.marks[-1].seconds if self.marks else 0.0) + self.lost_seconds

    @property
    def training(self) -> Mark:
        """Steps, seconds and tokens of training alone: evaluation and saving happen between marks of one step."""
        pairs = self.stretches()
        return Mark(
            step=sum(b.step - a.step for a, b in pairs),
            seconds=sum(b.seconds - a.seconds for a, b in pairs),
            tokens=sum(b.tokens - a.tokens for a, b in pairs),
        )

    def stretches(self) -> list[tuple[Mark, Mark]]:
        """Pairs of marks with training between them; without those that no time is known of."""
        pairs = itertools.pairwise(self.marks)
        return [(a, b) for a, b in pairs if b.step > a.step and b.seconds > a.seconds]

    def resume_at(self, step: int) -> None:
        """Forget what came after `step`, the checkpoint that a new process goes on from; its time becomes lost."""
        kept = [mark for mark in self.marks if mark.step <= step]
        if self.marks:
            self.lost_seconds += self.marks[-1].seconds - (kept[-1].seconds if kept else 0.0)
        self.marks = kept
        self.log_history = [row for row in self.log_history if row["step"] <= step]
        self.is_finished = False

    def save(self, directory: Path) -> None:
        """Write ``moe_run.json``; a killed process leaves the old file or the new one.

        Raises:
            OSError: the directory cannot be written.
        """
        history = [_finite(row) for row in self.log_history]
        content = {"format": _FORMAT, **asdict(self), "log_history": history}
        write_atomically(directory / RECORD_FILE, json.dumps(content, default=_plain))

    @classmethod
    def load(cls, file: Path) -> RunRecord:
        """Read what `save` has written.

        Raises:
            ConfigError: the file is damaged or of a newer version of this package.
        """
        content = _read(file)
        if content.pop("format", None) != _FORMAT:
            raise ConfigError(f"{file} is of another version of trl_moe_ext; install the one that trained the run")
        try:
            lists: dict[str, Any] = {
                "marks": [Mark(**mark) for mark in content.pop("marks")],
                "sessions": [Session(**session) for session in content.pop("sessions")],
                "adapted": [TrainedPart(**part) for part in content.pop("adapted")],
            }
            return cls(**lists, **content)
        except (LookupError, TypeError) as error:
            raise ConfigError(f"{file} is damaged ({error}); it cannot be reported") from error

    @classmethod
    def from_trainer_state(cls, file: Path) -> RunRecord:
        """What a checkpoint's ``trainer_state.json`` tells: the logs and the number of steps.

        Raises:
            ConfigError: the file is damaged.
        """
        content = _read(file)
        try:
            rows = [_finite(row) for row in content["log_history"]]
            return cls(log_history=rows, max_steps=int(content["max_steps"]))
        except (LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} is damaged ({error!r}); it cannot be reported") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); it cannot be reported") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is damaged: it holds a {type(content).__name__}; it cannot be reported")
    return content


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity; a report leaves a gap for None."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _plain(value: Any) -> Any:
    """Options and logged values that JSON does not know: sets, scalars of numpy and torch, else their text."""
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    return value.item() if hasattr(value, "item") else str(value)
