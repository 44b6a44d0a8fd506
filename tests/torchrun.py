"""Starts a module of the tests in several processes, and leaves none of them behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

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


def _end_group(leader: int) -> None:
    """The launcher and its workers, which are a group of their own, whatever state they are in."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return
