"""Measured numbers in the words of a reader: three digits, and a unit."""

from __future__ import annotations

import math


def figure(value: float) -> str:
    """Three digits, whatever the size: ``0.000123``, ``0.123``, ``1.23``, ``12,345``; a whole one as it is: ``6``."""
    rounded = abs(float(f"{value:.3g}"))
    if rounded >= 100 or value == int(value):
        return f"{value:,.0f}"
    if rounded < 1e-4:
        return scientific(value)
    return f"{value:.{2 - math.floor(math.log10(rounded))}f}"


def scientific(value: float, decimals: int = 1) -> str:
    """As many decimals as asked for, without zeros at their end: ``0``, ``5e-5``, ``1.5e-4``."""
    mantissa, _, exponent = f"{value:.{decimals}e}".partition("e")
    mantissa = mantissa.rstrip("0").removesuffix(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}" if value else "0"


def size(number: int, unit: str = "") -> str:
    """Three digits and a prefix of 1000: ``644M`` parameters, or ``61.3 GB`` with the unit ``B``."""
    prefixes = ((10**12, "T"), (10**9, "G" if unit else "B"), (10**6, "M"), (10**3, "k" if unit else "K"))
    divisor, prefix = next((pair for pair in prefixes if number >= pair[0]), (1, ""))
    return f"{figure(number / divisor)}{' ' if unit else ''}{prefix}{unit}"


def share(part: float, whole: float = 1.0) -> str:
    """Per cent; what would be rounded to nothing is ``<0.01%``."""
    return f"{part / whole:.2%}" if part / whole >= 0.00005 else "<0.01%"


def duration(seconds: float) -> str:
    """``0.124 s``, ``8.20 s``, ``4 min 12 s``, ``3 h 5 min`` or ``2 d 4 h``."""
    if seconds < 60:
        return f"{figure(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def count(number: int, noun: str) -> str:
    """``1 layer``, ``12 layers``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
