"""A line chart whose lines stretch with the page and whose words do not: positions in per mille of the plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_moe_ext.reporting.numbers import figure
from trl_moe_ext.reporting.page.ticks import axis_range, step_ticks, ticks

__all__ = ["Chart", "Line", "Points", "line_chart", "logged_chart", "points_of"]

Points = Sequence[tuple[float, float]]

_MOST_POINTS = 480  # of a line: more than a plot has pixels to show


@dataclass(frozen=True)
class Line:
    """A curve before it is drawn.

    Args:
        label: for the legend; may be empty where there is one line.
        points: steps and values, in the order of the steps.
        style: class of the style sheet: ``main``, ``second`` or ``faint``, which is not in the legend.
        has_dots: whether each point is marked.
    """

    label: str
    points: Points
    style: str = "main"
    has_dots: bool = False


@dataclass(frozen=True)
class DrawnLine:
    """A curve in the coordinates of the plot; `dots` are lines without length, which stay round when stretched."""

    label: str
    style: str
    path: str
    dots: str
    last: str


@dataclass(frozen=True)
class Chart:
    """All that the template needs; ticks are positions in per cent and labels."""

    title: str
    unit: str
    lines: list[DrawnLine]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    summary: str
    data: dict[str, Any]  # for reading values under the pointer


def points_of(rows: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Steps and values of `key` in the logs, without those that are not finite."""
    values = ((row["step"], row.get(key)) for row in rows)
    return [(step, float(v)) for step, v in values if isinstance(v, int | float) and math.isfinite(v)]


def reward_points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Steps and mean rewards: of all completions that were scored where that is logged, else of those trained on."""
    return points_of(rows, "rollout/reward") or points_of(rows, "reward")


def line_chart(title: str, lines: Sequence[Line], unit: str = "", is_from_zero: bool | None = None) -> Chart | None:
    """Lay out a chart over the steps.

    Args:
        title: what the values are.
        lines: the last one is drawn on top.
        unit: of the values, behind the title.
        is_from_zero: see `axis_range`.

    Returns:
        None if no line has a point.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    steps = [step for line in lines for step, _ in line.points]
    values = [value for line in lines for _, value in line.points]
    x = _step_range(min(steps), max(steps))
    y = axis_range(min(values), max(values), is_from_zero)
    told = [line for line in lines if line.style != "faint"]
    return Chart(
        title=title,
        unit=unit,
        lines=[_drawn(line, x, y) for line in lines],
        x_ticks=[(100 * _place(value, x), text) for value, text in step_ticks(int(x[0]), int(x[1]))],
        y_ticks=[(100 * _place(value, y), text) for value, text in ticks(*y)],
        summary="; ".join(f"{line.label or title}: {_first_to_last(line)}" for line in told),
        data={"x": x, "lines": [_data(line) for line in told]},
    )


def logged_chart(rows: Sequence[Mapping[str, Any]], title: str, unit: str, keys: Sequence[str]) -> Chart | None:
    """A chart of one line: the first of `keys` that the logs have values of; None if they have none."""
    charts = (line_chart(title, [Line("", points_of(rows, key))], unit) for key in keys)
    return next((chart for chart in charts if chart is not None), None)


def _step_range(first: float, last: float) -> tuple[float, float]:
    """From zero where the run did so, whose first log came a little later."""
    first = 0 if first <= 0.1 * last else first
    return first, max(last, first + 1)


def _place(value: float, ends: tuple[float, float]) -> float:
    return (value - ends[0]) / (ends[1] - ends[0])


def _drawn(line: Line, x: tuple[float, float], y: tuple[float, float]) -> DrawnLine:
    places = [(1000 * _place(a, x), 1000 - 1000 * _place(b, y)) for a, b in _thinned(line.points)]
    corners = [f"{a:.1f} {b:.1f}" for a, b in places]
    has_dots = len(corners) == 1 or (line.has_dots and len(corners) <= 60)
    return DrawnLine(
        label=line.label,
        style=line.style,
        path="M" + "L".join(corners) if len(corners) > 1 else "",
        dots="".join(f"M{corner}h0" for corner in corners) if has_dots else "",
        last=figure(line.points[-1][1]),
    )


def _thinned(points: Points) -> Points:
    """The lowest and the highest point of each stretch, so that no spike of a long run is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    size = math.ceil(len(points) / (_MOST_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return sorted({points[0], *kept, points[-1]})


def _first_to_last(line: Line) -> str:
    (first_step, first), (last_step, last) = line.points[0], line.points[-1]
    return f"{figure(first)} at step {first_step:,.0f} to {figure(last)} at step {last_step:,.0f}"


def _data(line: Line) -> list[tuple[float, str]]:
    """Steps and values as they are told."""
    return [(step, figure(value)) for step, value in _thinned(line.points)]
