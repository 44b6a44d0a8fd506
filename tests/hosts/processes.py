"""Fresh Python processes: what autoload does depends on what was imported before, so it is tested in new ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Seconds. An import of trl takes some eight seconds on two busy cores.
_TIMEOUT = 240


def run(command: list[str], cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would: no variables of ours, warnings as Python shows them by default."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("TRL_MOE_EXT_DISABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONPATH", "PYTHONWARNINGS")
    }
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        command, cwd=cwd, env=inherited | settings | dict(env or {}), capture_output=True, text=True, timeout=_TIMEOUT
    )


def run_python(code: str, cwd: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `code`, and fail with its output if it fails."""
    done = run([sys.executable, "-c", code], cwd, env)
    assert done.returncode == 0, f"{code}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"
    return done
