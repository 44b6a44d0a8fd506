"""When optimizer steps ended, and what was true at that moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from trl_moe_ext.errors import MoeExtError

__all__ = ["Measured", "StepClock"]

Reading = dict[str, float]


@dataclass(frozen=True)
class Measured:
    """The timed steps of one process, without those that warmed up.

    Attributes:
        steps: optimizer steps.
        seconds: from the end of the last step that warmed up to the end of the last.
        read: name -> how much a reading has grown in that time.
    """

    steps: int
    seconds: float
    read: Reading


class StepClock(TrainerCallback):  # type: ignore[misc]
    """Reads counters at the end of each optimizer step.

    Args:
        read: name -> a counter that only grows.
    """

    def __init__(self, read: Callable[[], Reading]) -> None:
        self._read = read
        self._readings: list[tuple[float, Reading]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time and the counters."""
        self._readings.append((time.perf_counter(), self._read()))

    def measured(self, warm_up: int) -> Measured:
        """What happened after the first `warm_up` steps.

        Raises:
            MoeExtError: there were no more steps than these.
        """
        steps = len(self._readings) - warm_up
        if steps < 1:
            raise MoeExtError(f"training ended after {len(self._readings)} steps, of which {warm_up} were to warm up")
        (start, before), (end, after) = self._readings[warm_up - 1], self._readings[-1]
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        return Measured(steps, end - start, grown)
