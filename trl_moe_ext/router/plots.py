"""Pictures of the routers for files and trackers: a heatmap of the load, and the curve of MaxVio."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_moe_ext.router.history import LoadRecord, RouterHistory
from trl_moe_ext.router.layer_curves import LayerCurves
from trl_moe_ext.router.load_scale import ABOVE, BELOW, LoadScale

__all__ = ["add_load_bar", "draw_loads", "faintness", "save_heatmap", "save_max_vio_curve", "set_title"]

_MISSING = "#e8e6e3"
_INK = "#2b2926"
_WIDE = 160  # experts from which on panels stand below each other


def save_heatmap(history: RouterHistory, path: Path) -> bool:
    """Draw the load of every expert in every layer at the start, in the middle and at the end into a PNG file.

    Args:
        history: of a run.
        path: the file to write.

    Returns:
        False, and nothing is written, if the history is empty.
    """
    from matplotlib.figure import Figure

    labels, records = history.labels, _start_middle_end(history.records)
    tables = [record.table(labels) for record in records]
    if not labels or not any(map(len, tables[0])):
        return False
    experts = max(len(table[0]) for table in tables)
    scale = LoadScale.of(load for table in tables for row in table for load in row)
    figure = Figure(figsize=_size(len(labels), experts, len(records)), layout="constrained")
    grid = (len(records), 1) if experts > _WIDE else (1, len(records))
    panels = figure.subplots(*grid, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, record, table in zip(panels, records, tables, strict=True):
        image = draw_loads(axes, labels, table, scale)
        set_title(axes, f"step {record.step:,}")
        axes.label_outer()
    figure.supylabel("layer", fontsize=10)
    add_load_bar(figure, image, list(panels), scale)
    figure.savefig(path, dpi=150, format="png")
    return True


def draw_loads(axes: Any, labels: Sequence[str], table: Sequence[Sequence[float]], scale: LoadScale) -> Any:
    """Draw a heatmap of layers x experts into `axes`, and name as many of both as can be read.

    Args:
        axes: of matplotlib.
        labels: of the layers.
        table: for each layer, the load of its experts divided by their mean; layers may have different numbers.
        scale: of the colours.

    Returns:
        The image, for `add_load_bar`.
    """
    from matplotlib.colors import LinearSegmentedColormap

    experts = max(map(len, table))
    colours = LinearSegmentedColormap.from_list("load", [BELOW, "#f7f5f2", ABOVE]).with_extremes(bad=_MISSING)
    positions = [[scale.position(load) for load in [*row, *[math.nan] * (experts - len(row))]] for row in table]
    image = axes.imshow(positions, cmap=colours, vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    rows = range(0, len(labels), math.ceil(len(labels) / 16))
    axes.set_yticks(rows, [labels[row] for row in rows])
    axes.set_xticks(range(0, experts, math.ceil(experts / 8)))
    axes.set_xlabel("expert")
    axes.tick_params(length=2, labelsize=8)
    return image


def add_load_bar(figure: Any, image: Any, axes: Any, scale: LoadScale) -> None:
    """Draw the key of the colours of `draw_loads` beside one or several axes."""
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, label="load / mean of the layer")
    bar.set_ticks([position for position, _ in scale.ticks()], labels=[label for _, label in scale.ticks()])


def set_title(axes: Any, title: str) -> None:
    """Write a small title above the left end of `axes`."""
    axes.set_title(title, fontsize=10, loc="left", color=_INK)


def faintness(layers: int) -> float:
    """The opacity of one layer's curve among those of so many."""
    return max(0.25, 0.9 - 0.02 * layers)


def save_max_vio_curve(source: RouterHistory | Iterable[Mapping[str, Any]], path: Path) -> bool:
    """Draw MaxVio over the steps, of each layer and of their mean, into a PNG file.

    Args:
        source: a history of the load, or `TrainerState.log_history`, whose keys ``router/max_vio`` and
            ``router/max_vio/<label>`` are read.
        path: the file to write.

    Returns:
        False, and nothing is written, if there is no MaxVio in `source`.
    """
    from matplotlib.figure import Figure

    if isinstance(source, RouterHistory):
        curves = LayerCurves.max_vio(source)
    else:
        curves = LayerCurves.from_log(source, "router/max_vio")
    if not curves.mean:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    faint = faintness(len(curves.layers))
    for index, curve in enumerate(curves.layers.values()):
        label = None if index else "each layer"
        axes.plot(*zip(*curve, strict=True), color=BELOW, linewidth=0.8, alpha=faint, label=label)
    _name_the_worst(axes, curves)
    dot = "o" if len(curves.mean) == 1 else None
    axes.plot(*zip(*curves.mean, strict=True), color=ABOVE, linewidth=2, marker=dot, label="mean of all layers")
    axes.set(xlabel="step", ylabel="MaxVio: busiest expert / mean - 1")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, format="png")
    return True


def _start_middle_end(records: Sequence[LoadRecord]) -> list[LoadRecord]:
    indices = sorted({0, len(records) // 2, len(records) - 1}) if records else []
    return [records[index] for index in indices]


def _size(layers: int, experts: int, panels: int) -> tuple[float, float]:
    """Inches: cells that can be seen in a small model, and a picture that fits a page for a large one."""
    height = min(max(0.3 * layers, 2.0), 5.0)
    if experts > _WIDE:
        return 10.0, min(height, 3.5) * panels + 0.5
    return min(max(0.3 * experts, 2.4), 4.2) * panels + 1.4, height + 0.7


def _name_the_worst(axes: Any, curves: LayerCurves) -> None:
    """Write the label of the layer that ends highest beside its end."""
    if curves.highest is not None and len(curves.layers) > 1:
        offset = {"xytext": (0, 4), "textcoords": "offset points", "ha": "right"}
        axes.annotate(f"layer {curves.highest}", curves.layers[curves.highest][-1], **offset, fontsize=8, color=BELOW)
