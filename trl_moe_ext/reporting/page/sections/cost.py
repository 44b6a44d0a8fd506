"""Time and memory that the run took."""

from __future__ import annotations

from dataclasses import dataclass

from trl_moe_ext.reporting.numbers import count, duration, figure, size
from trl_moe_ext.reporting.page.chart import Chart, Line, line_chart
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.section import Figure, Section
from trl_moe_ext.reporting.run_record import RunRecord

_TITLE = "Speed and memory"


@dataclass(frozen=True)
class MemoryRow:
    """The peak on a device; `per_cent` of what the device has, None where that is not known."""

    device: str
    peak: str
    total: str
    per_cent: float | None


def section(run: RunFiles) -> Section:
    """Wall time, speed and peak memory."""
    record = run.record
    if not record.marks and not record.peak_memory:
        return Section("cost", _TITLE, missing="Time and memory are not recorded here.")
    content = {"figures": _figures(record), "chart": _speed(record), "memory": _memory(record)}
    return Section("cost", _TITLE, _summary(record), content)


def _figures(record: RunRecord) -> list[Figure]:
    training = record.training
    figures = [Figure("Wall time", duration(record.wall_seconds), _beside_training(record))]
    if training.seconds:
        a_step = training.seconds / training.step
        figures.append(Figure("Steps", f"{figure(1 / a_step)} /s", f"{duration(a_step)} each"))
        if training.tokens:
            figures.append(Figure("Tokens", f"{figure(training.tokens / training.seconds)} /s", "training alone"))
    if record.marks and record.marks[-1].tokens:
        figures.append(Figure("Tokens seen", f"{record.marks[-1].tokens:,}"))
    return figures


def _beside_training(record: RunRecord) -> str:
    rest = record.wall_seconds - record.lost_seconds - record.training.seconds
    return f"{duration(rest)} of it evaluation and saving" if rest >= 0.05 else ""


def _summary(record: RunRecord) -> str:
    told = []
    if len(record.sessions) > 1:
        starts = ", ".join(f"{session.first_step:,}" for session in record.sessions[1:])
        told.append(f"The run went on from a checkpoint {count(len(record.sessions) - 1, 'time')}, at step {starts}.")
    if record.lost_seconds >= 0.05:
        told.append(f"{duration(record.lost_seconds)} went into steps that were repeated then.")
    if record.sessions and record.sessions[0].first_step:
        told.append(f"What came before step {record.sessions[0].first_step:,} is not recorded.")
    return " ".join(told)


def _speed(record: RunRecord) -> Chart | None:
    """Of each stretch between two logs: tokens a second, or steps where tokens were not counted."""
    pairs = record.stretches()
    if len(pairs) < 3:
        return None
    if record.training.tokens:
        points = [(b.step, (b.tokens - a.tokens) / (b.seconds - a.seconds)) for a, b in pairs]
        return line_chart("Speed", [Line("", points)], "tokens /s", is_from_zero=True)
    points = [(b.step, (b.step - a.step) / (b.seconds - a.seconds)) for a, b in pairs]
    return line_chart("Speed", [Line("", points)], "steps /s", is_from_zero=True)


def _memory(record: RunRecord) -> list[MemoryRow]:
    rows = []
    for device, peak in record.peak_memory.items():
        total = record.memory.get(device)
        name = "main process" if device == "process" else device
        per_cent = min(100 * peak / total, 100.0) if total else None
        rows.append(MemoryRow(name, size(peak, "B"), size(total, "B") if total else "", per_cent))
    return rows
