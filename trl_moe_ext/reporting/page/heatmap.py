"""The load of every expert in every layer as pictures, one pixel a cell: they scale with the page, and stay small.

Balance is transparent, so that one picture serves light and dark pages.
"""

from __future__ import annotations

import base64
import io
import math
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

from trl_moe_ext.reporting.numbers import count
from trl_moe_ext.router.history import RouterHistory
from trl_moe_ext.router.load_scale import ABOVE, BELOW, LoadScale

__all__ = ["Heatmap", "heatmap"]

_MOST_FRAMES = 24
_MOST_CELLS = 150_000  # of all frames together: some 0.6 MB of the page
_SMALL = 6  # pictures beside each other, besides the large one
_SHADES = 60  # on each side of balance
_NO_CELL = 0xFFFF

Table = list[list[float]]
T = TypeVar("T")


@dataclass(frozen=True)
class Frame:
    """The load at a step: `image` is the address of a PNG, `load` the relative load in hundredths, 16 bits a cell."""

    step: int
    image: str
    load: str


@dataclass(frozen=True)
class Heatmap:
    """All that the template needs; ticks are positions in per cent and labels.

    Args:
        frames: over time; the first and the last of the history are there.
        small: those for the pictures beside each other.
        labels: of the layers, from the top.
        experts: columns.
        height: of the large picture, in rem.
        x_ticks: experts.
        y_ticks: layers.
        scale_ticks: of the scale of colours, relative load.
        gradient: colours of that scale, for a style sheet.
        size: in words.
        has_gaps: whether some layers have fewer experts, or were not always seen.
    """

    frames: list[Frame]
    small: list[Frame]
    labels: list[str]
    experts: int
    height: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    scale_ticks: list[tuple[float, str]]
    gradient: str
    size: str
    has_gaps: bool

    @property
    def data(self) -> list[dict[str, object]]:
        """The frames for the slider."""
        return [asdict(frame) for frame in self.frames]


def heatmap(history: RouterHistory) -> Heatmap | None:
    """Draw the history; None if it is empty."""
    labels = history.labels
    experts = max((len(shares) for record in history.records for shares in record.layers.values()), default=0)
    if not experts:
        return None
    most = max(3, min(_MOST_FRAMES, _MOST_CELLS // (len(labels) * experts)))
    shown = _evenly(history.records, most)
    filled = [_filled(record.table(labels), experts) for record in shown]
    scale = LoadScale.of(load for table in filled for row in table for load in row)
    frames = [_frame(record.step, table, scale) for record, table in zip(shown, filled, strict=True)]
    return Heatmap(
        frames=frames,
        small=_evenly(frames, _SMALL),
        labels=labels,
        experts=experts,
        height=_height(len(labels)),
        x_ticks=_cell_ticks([str(expert) for expert in range(experts)], 8),
        y_ticks=_cell_ticks(labels, 16),
        scale_ticks=[(50 + 50 * position, label) for position, label in scale.ticks()],
        gradient=f"linear-gradient(90deg, {BELOW}, {BELOW}00, {ABOVE}00, {ABOVE})",
        size=f"{count(len(labels), 'layer')} of {count(experts, 'expert')}",
        has_gaps=any(math.isnan(load) for table in filled for row in table for load in row),
    )


def _evenly(items: Sequence[T], most: int) -> list[T]:
    """At most so many of them, at even distances, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _filled(table: Table, experts: int) -> Table:
    """Rows of the same length, also at a step that lacks the layers with the most experts."""
    return [row + [math.nan] * (experts - len(row)) for row in table]


def _frame(step: int, table: Table, scale: LoadScale) -> Frame:
    cells = [_NO_CELL if math.isnan(load) else min(round(100 * load), _NO_CELL - 1) for row in table for load in row]
    load = base64.b64encode(struct.pack(f"<{len(cells)}H", *cells)).decode()
    return Frame(step, _png(table, scale), load)


def _png(table: Table, scale: LoadScale) -> str:
    """A picture of a pixel a cell, as an address that holds it."""
    from PIL import Image

    picture = Image.new("P", (len(table[0]), len(table)))
    picture.putdata([_colour_index(scale.position(load)) for row in table for load in row])
    picture.putpalette([channel for colour in _PALETTE for channel in colour[:3]])
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, transparency=bytes(colour[3] for colour in _PALETTE))
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _palette() -> list[tuple[int, int, int, int]]:
    """Red, green, blue and opacity from the lowest load over balance to the highest, and of a cell that is not."""
    colours = []
    for shade in range(-_SHADES, _SHADES + 1):
        red, green, blue = bytes.fromhex((ABOVE if shade > 0 else BELOW)[1:])
        colours.append((red, green, blue, round(255 * abs(shade) / _SHADES)))
    return [*colours, (128, 128, 128, 64)]


_PALETTE = _palette()


def _colour_index(position: float) -> int:
    return len(_PALETTE) - 1 if math.isnan(position) else _SHADES + round(_SHADES * position)


def _height(layers: int) -> float:
    """Rows that can be told apart, and a picture that fits a screen."""
    return min(max(layers * (1.9 if layers <= 8 else 1.0 if layers <= 24 else 0.5), 6.0), 30.0)


def _cell_ticks(labels: Sequence[str], most: int) -> list[tuple[float, str]]:
    """Middles of cells, in per cent, and labels, at distances of 1, 2, 4, 5, 8, 10, 16, 20, ..."""
    rough = math.ceil(len(labels) / most)
    distance = next(d for d in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, rough) if d >= rough)
    return [(100 * (index + 0.5) / len(labels), labels[index]) for index in range(0, len(labels), distance)]
