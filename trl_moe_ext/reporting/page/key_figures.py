"""The head of the page: what run this is, how it ended, and the numbers that one asks for first."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import partial

from trl_moe_ext.reporting.numbers import duration, figure, share, size
from trl_moe_ext.reporting.page.chart import points_of, reward_points
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.section import Figure
from trl_moe_ext.reporting.run_record import RunRecord

__all__ = ["Head", "head"]

_OF_A_MODEL = (("loss", "Training loss"), ("eval_loss", "Evaluation loss"))
_OF_A_POLICY = (("reward", "Reward"), ("eval_reward", "Reward in evaluation"))


@dataclass(frozen=True)
class Head:
    """Title, a line about the model, state of the run, and key figures."""

    title: str
    about: str
    state: str
    is_finished: bool
    dates: str
    note: str
    figures: list[Figure]


def head(run: RunFiles) -> Head:
    """Read the head off a run."""
    record = run.record
    method = str(record.settings.get("adapter", {}).get("peft_type", "")).lower()
    model = record.model.get("name") or record.model.get("class", "")
    return Head(
        title=run.name,
        about=" with ".join(filter(None, [model, method])),
        state=_state(record),
        is_finished=record.is_finished,
        dates=_dates(record),
        note=run.note,
        figures=_figures(record),
    )


def _state(record: RunRecord) -> str:
    step, planned = record.step, record.max_steps
    of_planned = f"step {step:,} of {planned:,}" if planned else f"step {step:,}"
    if not record.sessions:
        return of_planned.capitalize()
    if not record.is_finished:
        return f"Not finished: last heard of at {of_planned}"
    return f"Finished, {step:,} steps" if step >= planned else f"Ended early, at {of_planned}"


def _dates(record: RunRecord) -> str:
    if not record.sessions:
        return ""
    start, end = (datetime.fromisoformat(at) for at in (record.sessions[0].started, record.sessions[-1].ended))
    until = f"{end:%H:%M}" if end.date() == start.date() else f"{end.day} {end:%B %Y, %H:%M}"
    return f"{start.day} {start:%B %Y, %H:%M} to {until} UTC"


def _figures(record: RunRecord) -> list[Figure]:
    figures = []
    # The loss of a policy says nothing about how good it is.
    is_policy = bool(points_of(record.log_history, "reward"))
    for key, label in _OF_A_POLICY if is_policy else _OF_A_MODEL:
        points = (reward_points if key == "reward" else partial(points_of, key=key))(record.log_history)
        if points:
            figures.append(Figure(label, figure(points[-1][1]), f"from {figure(points[0][1])}"))
    trained = sum(part.parameters for part in record.adapted)
    if trained:
        figures.append(
            Figure("Trained parameters", size(trained), f"{share(trained, record.total_parameters)} of the model")
        )
    training = record.training
    if record.wall_seconds:
        speed = f"{figure(training.tokens / training.seconds)} tokens/s" if training.tokens else ""
        figures.append(Figure("Wall time", duration(record.wall_seconds), speed))
    if record.peak_memory:
        device, peak = max(record.peak_memory.items(), key=lambda item: (item[0] != "process", item[1]))
        place = "main process" if device == "process" else device
        figures.append(Figure("Peak memory", size(peak, "B"), place))
    return figures
