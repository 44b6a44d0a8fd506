"""Round numbers on an axis."""

from __future__ import annotations

import math

from trl_moe_ext.reporting.numbers import scientific


def axis_range(low: float, high: float, is_from_zero: bool | None = None) -> tuple[float, float]:
    """The ends of an axis that holds `low` to `high`.

    Args:
        low: smallest value.
        high: largest value.
        is_from_zero: whether the axis starts at zero; if None, it does where that costs less than half of its length.
    """
    if is_from_zero is None:
        is_from_zero = low >= 0 and low < 0.5 * high
    if is_from_zero and low >= 0:
        low = 0.0
    if high - low <= max(1e-6 * abs(high), 1e-300):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin * (low != 0), high + margin
    for _ in range(3):  # a wider axis may have a wider step, on which its ends are to be
        step = tick_step(low, high)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return low, high


def tick_step(low: float, high: float, at_most: int = 5) -> float:
    """Distance of the ticks: 1, 2 or 5 times a power of ten, so that there are some `at_most` of them."""
    rough = (high - low) / at_most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def ticks(low: float, high: float, at_most: int = 5) -> list[tuple[float, str]]:
    """Round values between `low` and `high`, and how they are written."""
    step = tick_step(low, high, at_most)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [index * step for index in range(first, last + 1)]
    largest = max(abs(low), abs(high))
    if digits < 4 or largest >= 0.01:
        return [(value, f"{value:,.{digits}f}") for value in values]
    decimals = max(1, digits + math.floor(math.log10(largest)))  # of the largest, so that neighbours differ
    return [(value, scientific(value, decimals)) for value in values]


def step_ticks(first: int, last: int) -> list[tuple[float, str]]:
    """Ticks of an axis of steps, which are whole."""
    if last - first < 5:
        return [(float(step), f"{step:,}") for step in range(first, last + 1)]
    return ticks(first, last)
