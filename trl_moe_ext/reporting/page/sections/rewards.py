"""Whether a policy got better: its rewards, what it wrote, and the rewards that could not be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_moe_ext.reporting.numbers import count, figure
from trl_moe_ext.reporting.page.chart import Chart, Line, Points, line_chart, logged_chart, points_of, reward_points
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.section import Section

_TITLE = "Rewards"
_BY_FUNCTION = "rewards/"
_MOST_FUNCTIONS = 8
# Of the log: title, unit, and the keys of which the first that was logged is drawn.
_OTHERS = (
    ("Spread within a group", "standard deviation", ("reward_std",)),
    ("Length of completions", "tokens, mean", ("completions/mean_length",)),
    ("Completions cut at the limit", "share", ("completions/clipped_frac", "completions/clipped_ratio")),
    ("Entropy of the policy", "nats a token", ("entropy",)),
)
# Counters of the log, and what they count.
_FAILURES = (
    ("reward/raised_total", "raised an error"),
    ("reward/timeout_total", "took too long"),
    ("reward/invalid_total", "gave no valid number"),
)
_SMOOTHED_FROM = 40  # logs: a curve of fewer is read as it is


def section(run: RunFiles) -> Section | None:
    """Curves of the rewards, failures in words, completions; None for a run without rewards."""
    rows = run.record.log_history
    rewards = reward_points(rows)
    if not rewards:
        return None
    others = [logged_chart(rows, title, unit, keys) for title, unit, keys in _OTHERS]
    content = {
        "chart": line_chart("Reward", [*_smoothed(rewards), *_evaluation(rows)], "mean over the completions"),
        "charts": _functions(rows) + [chart for chart in others if chart is not None],
        "completions": run.completions,
    }
    return Section("rewards", _TITLE, " ".join([_course(rewards), *_failures(rows)]), content)


def _smoothed(points: Points) -> list[Line]:
    """A noisy curve in the back, and the mean of some logs before each point in front."""
    if len(points) < _SMOOTHED_FROM:
        return [Line("", points)]
    span = len(points) // 20
    values = [value for _, value in points]
    means = [sum(values[max(0, at - span + 1) : at + 1]) / min(span, at + 1) for at in range(len(values))]
    steps = [step for step, _ in points]
    return [Line("", points, style="faint"), Line(f"mean of {span} logs", list(zip(steps, means, strict=True)))]


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    points = points_of(rows, "eval_reward")
    return [Line("evaluation", points, style="second", has_dots=True)] if points else []


def _functions(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """A chart for each reward function, if there are several. TRL's sync trainer logs ``rewards/<name>/mean``."""
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(_BY_FUNCTION))
    keys = {key: None for key in keys if not key.endswith("/std")}
    if len(keys) < 2:
        return []
    named = ((key.removeprefix(_BY_FUNCTION).removesuffix("/mean"), points_of(rows, key)) for key in keys)
    charts = [line_chart(f"Reward of {name}", [Line("", points)]) for name, points in named]
    return [chart for chart in charts if chart is not None][:_MOST_FUNCTIONS]


def _course(points: Points) -> str:
    """From the first tenth of the logs to the last: single logs are noisy."""
    size = max(1, len(points) // 10)
    first, last = (sum(value for _, value in part) / size for part in (points[:size], points[-size:]))
    verb = "rose" if last > first else "fell" if last < first else "stayed"
    between = f", each the mean of {size} logs" if size > 1 else ""
    if len(points) == 1:
        return f"The mean reward was {figure(last)} at step {points[0][0]:,.0f}."
    return f"The mean reward {verb} from {figure(first)} to {figure(last)}{between}."


def _failures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on calls without a reward and on groups that nothing was learned from, if they were counted."""
    told = []
    counted = {words: _total(rows, key) for key, words in _FAILURES if any(key in row for row in rows)}
    if any(counted.values()):
        parts = [f"{words} {count(number, 'time')}" for words, number in counted.items() if number]
        told.append(f"Reward functions {', '.join(parts)}; those completions have no reward of them.")
    elif counted:
        told.append("No reward function failed.")
    skipped = _total(rows, "rollout/zero_advantage_total")
    if skipped:
        told.append(f"{count(skipped, 'group')} had the same reward throughout: there was nothing to learn from.")
    return told


def _total(rows: Sequence[Mapping[str, Any]], key: str) -> int:
    """A counter over the whole run: a log has what was counted since the one before."""
    return round(sum(value for _, value in points_of(rows, key)))
