"""The results as a picture: time and memory over the number of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_moe_ext.bench.figures import figure
from trl_moe_ext.bench.results import Results, Row

_FIGURES = (("milliseconds", "time of a step, ms"), ("megabytes", "memory over the idle model, MB"))
_MARKERS = "osD^vP*X"


def save_plot(results: Results, title: str, path: Path) -> None:
    """Draw a line a peer, or bars where there is one number of tokens, into a PNG file.

    Args:
        results: of a run; what was not measured is left out.
        title: above the picture.
        path: the file to write.
    """
    from matplotlib.figure import Figure

    picture = Figure(figsize=(11, 4.8), layout="constrained")
    picture.suptitle(title, fontsize=11)
    for axes, (name, label) in zip(picture.subplots(1, 2), _FIGURES, strict=True):
        if len(results.request.tokens) > 1:
            _lines(axes, results, name)
        else:
            _bars(axes, results, name)
        axes.set_title(label, fontsize=10)
    if len(results.request.tokens) > 1:
        handles, labels = picture.axes[0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside lower center", ncols=min(len(labels) or 1, 6), frameon=False)
    picture.savefig(path, dpi=120, format="png")


def _lines(axes: Any, results: Results, name: str) -> None:
    """Logarithmic on both axes; a band reaches from the lowest to the highest round."""
    from matplotlib.ticker import LogLocator

    for index, peer in enumerate(results.request.peers):
        points = [(row.tokens, getattr(row, name)) for row in _rows(results, peer) if getattr(row, name)]
        if not points:
            continue
        tokens, spreads = zip(*sorted(points), strict=True)
        colour = f"C{index}"
        medians = [spread.median for spread in spreads]
        axes.plot(tokens, medians, _MARKERS[index % len(_MARKERS)] + "-", color=colour, label=peer, markersize=5)
        axes.fill_between(tokens, [s.low for s in spreads], [s.high for s in spreads], color=colour, alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="tokens")
    axes.set_xticks(sorted(results.request.tokens), [f"{tokens:,}" for tokens in sorted(results.request.tokens)])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(_plain)
    axes.grid(alpha=0.3, which="both")


def _bars(axes: Any, results: Results, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in results.rows if getattr(row, name)]
    for index, row in enumerate(rows):
        spread = getattr(row, name)
        reach = [[spread.median - spread.low], [spread.high - spread.median]]
        bar = axes.barh(index, spread.median, xerr=reach, color=f"C{results.request.peers.index(row.peer)}", capsize=3)
        axes.bar_label(bar, [f" {figure(spread.median)}"], fontsize=9, padding=4)
    axes.set_yticks(range(len(rows)), [row.peer for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.25)  # for the labels
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_plain)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3, axis="x")


def _plain(value: float, _: int) -> str:
    """A number on an axis, written out."""
    return f"{value:,.10g}"


def _rows(results: Results, peer: str) -> list[Row]:
    return [row for row in results.rows if row.peer == peer]
