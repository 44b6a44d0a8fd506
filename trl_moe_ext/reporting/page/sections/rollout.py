"""How generation and training ran beside each other: who waited, how old the samples were, and what that cost."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_moe_ext.reporting.numbers import count, duration, figure, size
from trl_moe_ext.reporting.page.chart import Chart, Line, line_chart, logged_chart, points_of
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.section import Figure, Section

_TITLE = "Generation beside training"
_WAIT, _IDLE, _LAG = "trainer/wait_frac", "generator/idle_frac", "lag/"
# Of the log: title, unit, and the keys of which the first that was logged is drawn.
_CHARTS = (
    ("Samples ready for the trainer", "in the queue", ("rollout/queue_size",)),
    ("Sync of the adapter", "seconds until it is in use", ("sync/seconds",)),
    ("Effective sample size", "share of the tokens", ("importance/ess_share",)),
    ("KL divergence", "KL(trainer || generator), nats a token", ("importance/kl_k3", "kl")),
    ("Ratio", "trainer over generator, mean", ("importance/ratio_mean", "ratio")),
    ("Ratios beyond the limits", "share", ("importance/limited_share",)),
    ("Other experts than the generator's", "share of tokens, mean of the layers", ("router/replay_mismatch",)),
    ("The same in any layer", "share of tokens", ("router/replay_mismatch_any",)),
)


@dataclass(frozen=True)
class LagRow:
    """Samples that were so many versions behind the trainer, per cent of all."""

    lag: int
    share: str
    per_cent: float


def section(run: RunFiles) -> Section | None:
    """Shares of waiting, the timeline, lags, and the weights of old samples; None for a run that was not so."""
    rows = run.record.log_history
    if not any(key in row for row in rows for key in (_WAIT, _IDLE, f"{_LAG}0")):
        return None
    charts = [_waiting(rows), *(logged_chart(rows, *chart) for chart in _CHARTS)]
    content = {
        "figures": _figures(rows),
        "timeline": run.timeline and f"data:image/png;base64,{base64.b64encode(run.timeline).decode()}",
        "lags": _lags(rows),
        "charts": [chart for chart in charts if chart is not None],
    }
    return Section("rollout", _TITLE, " ".join(_sentences(rows)), content)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [value for _, value in points_of(rows, key)]
    return sum(values) / len(values) if values else None


def _waiting(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    lines = [
        Line("trainer waits", points_of(rows, _WAIT)),
        Line("generator idle", points_of(rows, _IDLE), style="second"),
    ]
    return line_chart("Time without work", lines, "share", is_from_zero=True)


def _lags(rows: Sequence[Mapping[str, Any]]) -> list[LagRow]:
    """Mean over the logs, which have about as many samples each."""
    keys = {key for row in rows for key in row if key.startswith(_LAG) and key.removeprefix(_LAG).isdecimal()}
    shares = {int(key.removeprefix(_LAG)): _mean(rows, key) or 0.0 for key in keys}
    total = sum(shares.values())
    return [LagRow(lag, f"{part / total:.1%}", 100 * part / total) for lag, part in sorted(shares.items()) if total]


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    figures = []
    for key, label in ((_WAIT, "Trainer waited"), (_IDLE, "Generator idle")):
        if (part := _mean(rows, key)) is not None:
            figures.append(Figure(label, f"{part:.0%}", "of its time, mean of the logs"))
    if lags := _lags(rows):
        behind = sum(row.lag * row.per_cent for row in lags) / 100
        figures.append(Figure("Samples behind", figure(behind), f"versions, at most {_oldest(lags)}"))
    if (seconds := _mean(rows, "sync/seconds")) is not None:
        sent = _mean(rows, "sync/bytes")
        figures.append(Figure("Sync of the adapter", duration(seconds), size(round(sent), "B") if sent else ""))
    if speed := _mean(rows, "rollout/generated_tok_s"):
        figures.append(Figure("Generated", f"{figure(speed)} /s", "tokens"))
    return figures


def _oldest(lags: Sequence[LagRow]) -> int:
    return max((row.lag for row in lags if row.per_cent), default=0)


def _sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told = []
    wait, idle = _mean(rows, _WAIT), _mean(rows, _IDLE)
    if wait is not None and idle is not None:
        if max(wait, idle) < 0.05:
            told.append("Trainer and generator kept each other busy.")
        elif wait > idle:
            told.append("The trainer waited for samples more than the generator for the trainer.")
        else:
            told.append("The generator waited for the trainer more than the trainer for samples.")
    if any("rollout/restarts_total" in row for row in rows):
        restarts = [(step, value) for step, value in points_of(rows, "rollout/restarts_total") if value]
        number = round(sum(value for _, value in restarts))
        first = f", first before step {restarts[0][0]:,.0f}" if restarts else ""
        times = f"restarted {count(number, 'time')}{first}" if number else "never restarted"
        told.append(f"The generator was {times}.")
    stale = round(sum(value for _, value in points_of(rows, "rollout/stale_total")))
    if stale:
        told.append(f"{count(stale, 'group')} had become too old in the queue, and their prompts were asked again.")
    return told
