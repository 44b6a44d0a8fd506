"""The picture of a profile: how few experts get how much, and which ones those are."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from trl_moe_ext.files import write_atomically
from trl_moe_ext.profiles.coverage import coverage_curve, mean_curve
from trl_moe_ext.profiles.profile import ExpertProfile
from trl_moe_ext.router.load_scale import ABOVE, BELOW, LoadScale
from trl_moe_ext.router.plots import add_load_bar, draw_loads, faintness, set_title

__all__ = ["save_profile_plot"]


def save_profile_plot(profile: ExpertProfile, path: Path, score: str = "token_share") -> None:
    """Draw coverage curves and a heatmap of layers x experts into a PNG file, which is whole or not there.

    Args:
        profile: of a model.
        path: the file to write.
        score: what use is measured by.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    layers = [layer.shares(score) for layer in profile.layers]
    height = min(max(0.28 * len(layers) + 1.2, 4.0), 6.5)
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_coverage(left, [coverage_curve(shares) for shares in layers])
    loads = [[share * len(shares) for share in shares] for shares in layers]
    scale = LoadScale.of(load for row in loads for load in row)
    image = draw_loads(right, [layer.label for layer in profile.layers], loads, scale)
    right.set_ylabel("layer")
    set_title(right, f"use of each expert, {profile.tokens:,} tokens")
    add_load_bar(figure, image, right, scale)
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    write_atomically(path, picture.getvalue())


def _draw_coverage(axes: Any, curves: list[tuple[float, ...]]) -> None:
    for number, curve in enumerate(curves):
        label = None if number else "each layer"
        axes.plot(*_per_cent(curve), color=BELOW, linewidth=0.8, alpha=faintness(len(curves)), label=label)
    axes.plot(*_per_cent(mean_curve(curves)), color=ABOVE, linewidth=2, label="mean of all layers")
    axes.plot([0, 100], [0, 100], color="0.6", linewidth=1, linestyle="--", label="equal use")
    axes.set(xlabel="experts of a layer, most used first (%)", ylabel="what they get (%)")
    axes.set(xlim=(0, 100), ylim=(0, 100.5), xticks=range(0, 101, 25), yticks=range(0, 101, 25))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    set_title(axes, "coverage")


def _per_cent(curve: tuple[float, ...]) -> tuple[list[float], list[float]]:
    return [100 * number / (len(curve) - 1) for number in range(len(curve))], [100 * part for part in curve]
