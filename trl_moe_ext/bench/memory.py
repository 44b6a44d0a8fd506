"""The most memory that a process held since a moment: the allocator's on CUDA, the resident set on a CPU."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> int | None:
    """Forget the peak so far.

    Returns:
        Bytes that are held now; None where the system does not tell.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    _return_free_memory()
    try:
        _RESET.write_text("5")  # sets VmHWM to the resident set of now
    except OSError:
        return None
    return peak(device)


def peak(device: torch.device) -> int | None:
    """Most bytes held since `reset_peak`; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _return_free_memory() -> None:
    """Memory that the C library keeps for later would hide what the steps allocate."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
