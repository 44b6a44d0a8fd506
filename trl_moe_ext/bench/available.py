"""How much memory is left for a model: of the machine, of the container that the process runs in, or of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

# Of a control group, version 2 and 1: the limit, what is used, and in the statistics the cache that can be given up.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that may still be taken on `device`; None where the system does not tell.

    Args:
        root: of the file system, for the figures of a CPU's memory.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return min([*_left_on_the_machine(root), *_left_in_groups(root)], default=None)


def _left_on_the_machine(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable"):
            yield int(line.split()[1]) * 1024


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the control groups of the process leave, the innermost and those around it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", _FILES[0]
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", _FILES[1]
        else:
            continue
        group = base / path.strip("/")
        for directory in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
            yield from _left_in_group(directory, *names)


def _left_in_group(directory: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    limit, usage = _lines(directory / limit_name), _lines(directory / usage_name)
    if not limit or not usage or limit[0] == "max":
        return
    cache = sum(int(line.split()[1]) for line in _lines(directory / "memory.stat") if line.split()[0] == cache_name)
    yield max(0, int(limit[0]) - int(usage[0]) + cache)


def _lines(path: Path) -> list[str]:
    """The lines of a file; none where there is no such file."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
