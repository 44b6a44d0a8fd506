"""How the loss went, and what else tells whether the training was sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_moe_ext.reporting.numbers import count, figure
from trl_moe_ext.reporting.page.chart import Chart, Line, Points, line_chart, points_of
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.section import Section

# Of the log: key, title and unit of the small charts.
_OTHERS = (
    ("mean_token_accuracy", "Tokens predicted right", "share"),
    ("grad_norm", "Norm of the gradient", "before clipping"),
    ("learning_rate", "Learning rate", ""),
)


_RISE = 0.01  # of the evaluation loss above its lowest value; less is noise


def section(run: RunFiles) -> Section:
    """The curves of training and evaluation loss."""
    rows = run.record.log_history
    training, evaluation = points_of(rows, "loss"), points_of(rows, "eval_loss")
    lines = [Line("training", training), Line("evaluation", evaluation, style="second", has_dots=True)]
    chart = line_chart("Loss", lines)
    if chart is None:
        missing = "No loss was logged: the run ended before its first log. `logging_steps` sets how often it is."
        return Section("loss", "Loss", missing=missing)
    charts = [other for key, title, unit in _OTHERS if (other := _other(rows, key, title, unit))]
    summary = " ".join([*_sentences(training, evaluation), *_not_finite(rows)])
    return Section("loss", "Loss", summary, {"chart": chart, "charts": charts})


def _other(rows: Sequence[Mapping[str, Any]], key: str, title: str, unit: str) -> Chart | None:
    return line_chart(title, [Line("", points_of(rows, key))], unit)


def _sentences(training: Points, evaluation: Points) -> list[str]:
    told = []
    for name, points in (("Training", training), ("Evaluation", evaluation)):
        if points:
            told.append(f"{name} loss {_course(points)}.")
    if len(evaluation) > 1:
        step, lowest = min(evaluation, key=lambda point: point[1])
        if lowest < evaluation[-1][1] - _RISE * abs(lowest):
            told.append(f"Its lowest value was {figure(lowest)}, at step {step:,.0f}: later steps may overfit.")
    return told


def _course(points: Points) -> str:
    (start, first), (end, last) = points[0], points[-1]
    if start == end:
        return f"was {figure(last)} at step {end:,.0f}"
    verb = "fell" if last < first else "rose" if last > first else "stayed"
    return f"{verb} from {figure(first)} at step {start:,.0f} to {figure(last)} at step {end:,.0f}"


def _not_finite(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence if the loss was lost: a record has None for what is not finite."""
    steps = [row["step"] for row in rows if row.get("loss", 0) is None or row.get("eval_loss", 0) is None]
    return [f"It was not finite in {count(len(steps), 'log')}, first at step {steps[0]:,}."] if steps else []
