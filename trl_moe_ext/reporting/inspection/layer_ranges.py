"""Lists of layers, short enough for a line."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


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
