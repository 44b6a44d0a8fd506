"""The loss of a run as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


def save_loss_curve(log_history: Iterable[Mapping[str, float]], path: Path) -> bool:
    """Draw training and evaluation loss over the steps into a PNG file.

    Args:
        log_history: `TrainerState.log_history`.
        path: the file to write.

    Returns:
        False, and nothing is written, if the history has no loss.
    """
    from matplotlib.figure import Figure

    history = list(log_history)
    curves = {name: [(row["step"], row[name]) for row in history if name in row] for name in ("loss", "eval_loss")}
    if not any(curves.values()):
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (("loss", "training loss", "-"), ("eval_loss", "evaluation loss", "o-")):
        if curves[name]:
            axes.plot(*zip(*curves[name], strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if all(value >= 0 for curve in curves.values() for _, value in curve):  # the loss of GRPO may be negative
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
