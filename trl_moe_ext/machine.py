"""The processor that this process runs on, and how much of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["processor", "usable_cores"]

_CPUINFO = Path("/proc/cpuinfo")  # of Linux


def processor() -> str:
    """What the maker calls it, where the system tells; else what Python calls its kind."""
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def usable_cores() -> int | None:
    """How many cores the process may use, which may be fewer than there are; None where the system does not tell."""
    # macOS has no sched_getaffinity.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
