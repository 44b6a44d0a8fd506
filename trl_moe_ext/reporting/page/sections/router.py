"""Where the tokens went: the load of every expert over time, and how far it was from balance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_moe_ext.reporting.numbers import figure
from trl_moe_ext.reporting.page.chart import Line, line_chart, points_of
from trl_moe_ext.reporting.page.heatmap import heatmap
from trl_moe_ext.reporting.page.layer_table import layer_table
from trl_moe_ext.reporting.page.layered_chart import layered_chart
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.section import Figure, Section
from trl_moe_ext.router.layer_curves import LayerCurves

_TITLE = "Balance of the experts"
_MAX_VIO_UNIT = "load of the busiest expert over the mean, less one"
_MISSING = (
    "The routers were not watched in this run. `MoeSFTTrainer` logs them: `trl sft --peft_type moe_lora` uses it, and "
    '`--router_metrics full`, or `MoeSFTConfig(router_metrics="full")` in Python, adds every layer and every expert. '
    "A dense model has no routers."
)
# Of the log: key, title, unit.
_OTHERS = (
    ("router/entropy", "Entropy of the routers", "1: undecided, 0: sure"),
    ("router/dead_experts", "Experts without a token", "all layers"),
    ("router/selected_mass", "Probability on the chosen experts", "share"),
    ("router/aux_loss", "Auxiliary loss", ""),
)


def section(run: RunFiles) -> Section:
    """The heatmap, the curves of MaxVio, and the summaries of the routers."""
    rows = run.record.log_history
    curves = _curves(run)
    picture = heatmap(run.history)
    others = [line_chart(title, [Line("", points_of(rows, key))], unit) for key, title, unit in _OTHERS]
    charts = [chart for chart in others if chart is not None]
    if not (curves.mean or picture or charts):
        return Section("router", _TITLE, missing=_MISSING)
    content = {
        "figures": _figures(rows, curves),
        "heatmap": picture,
        "chart": layered_chart("MaxVio", curves, _MAX_VIO_UNIT),
        "charts": charts,
        "layers": layer_table(run.history),
    }
    return Section("router", _TITLE, _summary(curves), content)


def _curves(run: RunFiles) -> LayerCurves:
    """From the log where it has the layers, else from the load of the experts, else the mean alone."""
    logged = LayerCurves.from_log(run.record.log_history, "router/max_vio")
    if logged.layers or not run.history.records:
        return logged
    recorded = LayerCurves.max_vio(run.history)
    return LayerCurves(recorded.layers, logged.mean or recorded.mean)


def _summary(curves: LayerCurves) -> str:
    """What the curves of MaxVio say."""
    if not curves.mean:
        return ""
    first, last = curves.mean[0][1], curves.mean[-1][1]
    told = f"At the end the busiest expert of a layer took {figure(last + 1)} times the mean load"
    told += f", averaged over the layers; at the start it was {figure(first + 1)} times."
    if curves.highest is not None and len(curves.layers) > 1:
        worst = curves.layers[curves.highest][-1][1]
        told += f" The least balanced layer is {curves.highest}, with {figure(worst + 1)} times."
    return told


def _figures(rows: Sequence[Mapping[str, Any]], curves: LayerCurves) -> list[Figure]:
    figures = []
    if curves.mean:
        figures.append(Figure("MaxVio, mean of the layers", *_now_and_before(curves.mean)))
    worst = points_of(rows, "router/max_vio_max")
    if worst:
        figures.append(Figure("MaxVio, worst layer", *_now_and_before(worst)))
    for key, label in (("router/dead_experts", "experts without a token"), ("router/entropy", "router entropy")):
        if points := points_of(rows, key):
            figures.append(Figure(label.capitalize(), *_now_and_before(points)))
    return figures


def _now_and_before(points: Sequence[tuple[float, float]]) -> tuple[str, str]:
    remark = f"{figure(points[0][1])} at step {points[0][0]:,.0f}" if len(points) > 1 else ""
    return figure(points[-1][1]), remark
