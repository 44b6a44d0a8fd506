"""The scale of every picture of the load: logarithmic, centred at balance, so that half and double weigh the same."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["ABOVE", "BELOW", "LoadScale"]

ABOVE = "#bf4a17"  # more than its part
BELOW = "#466a8c"  # less than its part

# A picture of a balanced run must not blow up noise; beyond 16 times the mean there is nothing to tell apart.
_NARROWEST, _WIDEST = 2, 16

TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class LoadScale:
    """Relative loads from ``1 / limit`` to `limit`, a power of two; what is beyond has the colour of the end."""

    limit: int

    @classmethod
    def of(cls, loads: Iterable[float]) -> LoadScale:
        """The narrowest scale that holds the largest of `loads`; NaN does not count."""
        largest = max((load for load in loads if not math.isnan(load)), default=1.0)
        return cls(min(max(2 ** math.ceil(math.log2(max(largest, 1.0))), _NARROWEST), _WIDEST))

    def position(self, load: float) -> float:
        """From -1, the lower end, over 0, balance, to 1, the upper end; NaN stays NaN."""
        if math.isnan(load):
            return math.nan
        if load <= 0:
            return -1.0
        return min(max(math.log2(load) / math.log2(self.limit), -1.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Positions and labels at the powers of two, of which a wide scale shows every second one."""
        reach = int(math.log2(self.limit))
        powers = range(-reach, reach + 1, 2 if reach > 2 and reach % 2 == 0 else 1)
        return [(power / reach, _label(power)) for power in powers]


def _label(power: int) -> str:
    return (str(2**power) if power >= 0 else f"1/{2**-power}") + TIMES
