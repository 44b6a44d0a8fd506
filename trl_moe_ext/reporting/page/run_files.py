"""The files of a run that a report reads."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.reporting.page.completions import CompletionsAtStep, read_completions
from trl_moe_ext.reporting.rollout_files import TIMELINE_PICTURE
from trl_moe_ext.reporting.run_record import RECORD_FILE, RunRecord
from trl_moe_ext.router.history import HISTORY_FILE, RouterHistory

__all__ = ["RunFiles", "read_run"]

_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class RunFiles:
    """A run as it is on disk.

    Args:
        name: of the directory.
        record: the record of the run.
        history: the load of the experts; empty if it was not recorded.
        note: what the report lacks, if it was made from a checkpoint or a file of it is damaged.
        completions: some that a GRPO run has kept.
        timeline: the picture of an asynchronous run, PNG; None for another run.
    """

    name: str
    record: RunRecord
    history: RouterHistory
    note: str = ""
    completions: list[CompletionsAtStep] = field(default_factory=list)
    timeline: bytes | None = None


def read_run(directory: Path) -> RunFiles:
    """Read a run from its output directory, or what a checkpoint tells of it.

    Raises:
        ConfigError: there is no run in `directory`, or one of its files is damaged.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; give the output_dir of a training run")
    name = directory.resolve().name
    history = RouterHistory.load(directory / HISTORY_FILE)
    if (directory / RECORD_FILE).is_file():
        record = RunRecord.load(directory / RECORD_FILE)
        completions, note = read_completions(directory, record.step)
        picture = directory / TIMELINE_PICTURE
        timeline = picture.read_bytes() if picture.is_file() else None
        return RunFiles(name, record, history, note, completions, timeline)
    if (directory / _STATE_FILE).is_file():
        record = RunRecord.from_trainer_state(directory / _STATE_FILE)
        name = f"{directory.resolve().parent.name}, {name}" if name.startswith("checkpoint-") else name
        return RunFiles(name, record, history, _lacking(directory))
    raise ConfigError(f"{directory} has no {RECORD_FILE}: {_found(directory)}. {_how_to_get_one()}")


def _lacking(directory: Path) -> str:
    whole = directory.resolve().parent / RECORD_FILE
    remedy = f" The whole run: `trl-moe report {whole.parent}`" if whole.is_file() else ""
    return (
        f"Made from `{_STATE_FILE}` alone, which holds the logs. What was adapted, memory, speed and settings are in "
        f"`{RECORD_FILE}`, which is not in this directory.{remedy}"
    )


def _found(directory: Path) -> str:
    """What is there instead, for a message."""
    checkpoints = [path.parent for path in directory.glob(f"checkpoint-*/{_STATE_FILE}")]
    if checkpoints:
        newest = max(checkpoints, key=lambda path: int((re.findall(r"\d+", path.name) or ["0"])[-1]))
        return f"it holds checkpoints; `trl-moe report {newest}` makes a shorter report from the last one"
    files = sorted(path.name for path in directory.iterdir())
    if not files:
        return "the directory is empty"
    return f"it holds {', '.join(files[:6])}{', ...' if len(files) > 6 else ''}"


def _how_to_get_one() -> str:
    return (
        "Training with `trl sft --peft_type moe_lora` (or moe_esft, or another command of trl) writes it, and so does "
        "MoeSFTTrainer; give another trainer callbacks=[trl_moe_ext.reporting.record_callback.RunRecordCallback()]"
    )
