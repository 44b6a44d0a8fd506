"""Who waited for whom, as a picture: some steps from the middle of a run, and the shares of each state over it all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trl_moe_ext.grpo.timeline import GENERATOR, REWARDS, TRAINER, Span, Timeline
from trl_moe_ext.grpo.timeline_file import TimelineRecord
from trl_moe_ext.reporting.rollout_files import TIMELINE_FILE, TIMELINE_PICTURE

__all__ = ["save_timeline", "save_timeline_plot", "steady_window", "stretch_shares"]

_LANES = (TRAINER, GENERATOR, REWARDS)
# State -> label, colour and hatching. The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which
# readers with any colour vision tell apart; time without work is grey, and what is waited for is hatched.
_STATES = {
    "training": ("training", "#0072B2", ""),
    "generating": ("generating", "#E69F00", ""),
    "scoring": ("scoring", "#009E73", ""),
    "sync": ("sending the adapter", "#D55E00", ""),
    "loading": ("loading model or adapter", "#CC79A7", ""),
    "restarting": ("restarting", "#000000", ""),
    "waiting": ("waiting for samples", "#c9c5bd", "////"),
    "idle": ("idle", "#eeebe5", ""),
}
_UNKNOWN_COLOUR = "#888888"
_INK = "#2b2926"
_STEPS = 8  # in the window: more are too narrow to be read
_MOST_STRETCHES = 120  # of the whole run; less if there would not be some syncs in each


def save_timeline(timeline: Timeline, output_dir: str | Path) -> list[Path]:
    """Write the timeline of a run, and its picture, into its output directory.

    Never raises: what goes wrong here, after a training that went well, is a warning.

    Returns:
        The files that were written: ``async_timeline.jsonl`` and ``async_timeline.png``; none for an empty timeline.
    """
    directory, record = Path(output_dir), TimelineRecord.of(timeline)
    if not record.spans:
        return []
    files: dict[str, Callable[[Path], object]] = {
        TIMELINE_FILE: record.save,
        TIMELINE_PICTURE: lambda path: save_timeline_plot(record, path),
    }
    written = []
    for name, write in files.items():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write(directory / name)
            written.append(directory / name)
        except Exception as error:  # whatever a file system or a drawing library may raise
            warnings.warn(f"{directory / name} was not written: {error!r}", RuntimeWarning, stacklevel=2)
    return written


def save_timeline_plot(record: TimelineRecord, path: Path) -> bool:
    """Draw a lane each for trainer, generator and rewards into a PNG file.

    Returns:
        False, and nothing is written, if the timeline is empty.
    """
    from matplotlib.figure import Figure

    if not record.spans:
        return False
    start, end = steady_window(record.spans)
    whole = record.spans[0].start, max(span.end for span in record.spans)
    is_whole = (start, end) == whole
    lanes = [lane for lane in _LANES if lane in record.seconds]
    heights = [1.0] * len(lanes) + ([] if is_whole else [1.5 * len(lanes)])
    figure = Figure(figsize=(11, 1.1 * sum(heights) * 0.9 + 1.0), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, lane in zip(panels, lanes, strict=False):
        _draw_lane(axes, [span for span in record.spans if span.lane == lane], start, end)
        axes.set_title(_in_words(record, lane), fontsize=10, loc="left", color=_INK)
    for axes in panels[: len(lanes) - 1]:
        axes.tick_params(labelbottom=False)
    what = (
        "seconds since the start" if is_whole else f"seconds since the start: {_STEPS} syncs in the middle of the run"
    )
    panels[len(lanes) - 1].set_xlabel(what, fontsize=9)
    if not is_whole:
        _draw_whole(panels[-1], record.spans, lanes, *whole, (start, end))
    figure.legend(handles=_handles(record.spans), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, format="png")
    return True


def steady_window(spans: Sequence[Span], steps: int = _STEPS) -> tuple[float, float]:
    """Start and end of so many syncs from the middle of the run; of the whole of it if there are not many more."""
    syncs = sorted(span.end for span in spans if (span.lane, span.state) == (TRAINER, "sync"))
    if len(syncs) < steps + 4:
        return min(span.start for span in spans), max(span.end for span in spans)
    first = (len(syncs) - steps) // 2
    return syncs[first], syncs[first + steps]


def stretch_shares(
    spans: Sequence[Span], lane: str, start: float, end: float, stretches: int
) -> dict[str, list[float]]:
    """State -> the share of it that `lane` had in each of so many equal stretches from `start` to `end`."""
    width = (end - start) / stretches
    shares: dict[str, list[float]] = {}
    for span in spans:
        if span.lane != lane or span.end <= start or span.start >= end or not width:
            continue
        row = shares.setdefault(span.state, [0.0] * stretches)
        first = max(0, int((span.start - start) / width))
        for index in range(first, stretches):
            low, high = start + index * width, start + (index + 1) * width
            if low >= span.end:
                break
            row[index] += max(0.0, min(high, span.end) - max(low, span.start)) / width
    return shares


def _draw_lane(axes: Any, spans: Sequence[Span], start: float, end: float) -> None:
    for state in dict.fromkeys(span.state for span in spans):
        ranges = [
            (max(start, s.start), min(end, s.end) - max(start, s.start))
            for s in spans
            if s.state == state and s.end > start and s.start < end
        ]
        _, colour, hatch = _look(state)
        axes.broken_barh(ranges, (0, 1), facecolor=colour, hatch=hatch, edgecolor="#8d887e" if hatch else "none", lw=0)
    axes.set(xlim=(start, end), ylim=(0, 1), yticks=[])
    _plain(axes)


def _draw_whole(
    axes: Any, spans: Sequence[Span], lanes: Sequence[str], start: float, end: float, window: tuple[float, float]
) -> None:
    """Each lane as stacked shares of its states, work at the bottom."""
    syncs = sum((span.lane, span.state) == (TRAINER, "sync") for span in spans)
    stretches = max(12, min(_MOST_STRETCHES, syncs // 3))
    width = (end - start) / stretches
    lefts = [start + index * width for index in range(stretches)]
    for row, lane in enumerate(lanes):
        bottoms = [len(lanes) - 1.0 - row] * stretches
        shares = stretch_shares(spans, lane, start, end, stretches)
        for state in (*_STATES, *(shares.keys() - _STATES.keys())):
            if state in shares:
                heights = [0.88 * share for share in shares[state]]
                _, colour, hatch = _look(state)
                axes.bar(lefts, heights, width, bottoms, align="edge", color=colour, hatch=hatch, ec="#8d887e", lw=0)
                bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    for edge in window:
        axes.axvline(edge, color=_INK, lw=0.8, ls=(0, (4, 3)))
    axes.set(xlim=(start, end), ylim=(0, len(lanes)), yticks=[len(lanes) - 0.56 - row for row in range(len(lanes))])
    axes.set_yticklabels(lanes, fontsize=9)
    axes.set_title(
        "the whole run: shares of time; between the lines is what is above", fontsize=10, loc="left", color=_INK
    )
    axes.set_xlabel("seconds since the start", fontsize=9)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=8, length=2)


def _in_words(record: TimelineRecord, lane: str) -> str:
    """The lane and the shares of its states over the whole run."""
    told = [f"{_look(state)[0]} {share:.0%}" for state, share in record.shares(lane).items() if share >= 0.005]
    return f"{lane}:  {', '.join(told)}"


def _handles(spans: Sequence[Span]) -> list[Any]:
    from matplotlib.patches import Patch

    present = {span.state for span in spans}
    states = [state for state in _STATES if state in present] + sorted(present - _STATES.keys())
    looks = [_look(state) for state in states]
    return [Patch(fc=colour, hatch=hatch, ec="#8d887e", lw=0.5, label=label) for label, colour, hatch in looks]


def _look(state: str) -> tuple[str, str, str]:
    return _STATES.get(state, (state, _UNKNOWN_COLOUR, ""))
