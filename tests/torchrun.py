"""Starts a module of the tests in several processes, ends each of them, and leaves none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

_REPOSITORY = Path(__file__).parents[1]
_TIMEOUT = 300  # seconds; two imports of trl on two busy cores take one minute


def torchrun(module: str, *arguments: str, processes: int = 2, env: Mapping[str, str] | None = None) -> None:
    """Run `module` in each process, and fail with what they print if one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with subprocess.Popen(
        [*command, "-m", module, *arguments],
        cwd=_REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as launcher:
        try:
            output, _ = launcher.communicate(timeout=_TIMEOUT)
        finally:
            _end_group(launcher.pid)
    assert launcher.returncode == 0, output


def save_and_leave(seen: Any, folder: Path) -> NoReturn:
    """What each process does at its end: keep what it has seen under its rank, and go when all have done so."""
    torch.save(seen, folder / f"{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    # Gloo's threads can keep a process from ending.
    sys.stdout.flush()
    os._exit(0)


def _end_group(leader: int) -> None:
    """The launcher and its workers, which are a group of their own, whatever state they are in."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
