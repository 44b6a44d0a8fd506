"""Measured numbers for a reader: three digits, whatever their size."""

from __future__ import annotations


def figure(value: float) -> str:
    """``0.12``, ``1.23``, ``12.3``, ``123`` or ``12,345``."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"
