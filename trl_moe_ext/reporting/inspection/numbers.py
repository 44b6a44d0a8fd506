"""Large numbers and lists of layers, short enough for a line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))
_BYTE_UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


def compact_count(number: int) -> str:
    """A number of parameters with four digits at most: ``30.53B``."""
    return _compact(number, _UNITS, "")


def compact_bytes(number: int) -> str:
    """A number of bytes in powers of 1000: ``2.57 GB``."""
    return _compact(number, _BYTE_UNITS, " ")


def compact_share(share: float) -> str:
    """A share in per cent; one that would be rounded to nothing is ``<0.01%``."""
    return f"{share:.2%}" if share >= 0.00005 else "<0.01%"


def _compact(number: int, units: Sequence[tuple[int, str]], separator: str) -> str:
    for size, unit in units:
        if number >= size:
            value = number / size
            digits = 2 if value < 10 else 1 if value < 100 else 0
            return f"{value:.{digits}f}{separator}{unit}"
    return f"{number}{separator}{'B' if separator else ''}"


def ranges(indices: Sequence[int]) -> str:
    """Ascending indices in short: ``0-47``, ``1, 3-5``, or ``1, 3, ..., 47`` where the distance is always the same."""
    steps = {b - a for a, b in itertools.pairwise(indices)}
    if len(indices) > 3 and len(steps) == 1 and steps != {1}:
        return f"{indices[0]}, {indices[1]}, ..., {indices[-1]}"
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
