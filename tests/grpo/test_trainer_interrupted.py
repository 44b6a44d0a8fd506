"""A run that is told to stop, or killed: a checkpoint, no child, and another run that goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.tolerances import assert_output_close

_REPOSITORY = Path(__file__).parents[2]
_TIMEOUT = 120  # seconds; a start takes ten on two busy cores

pytestmark = pytest.mark.slow


def start(folder: Path, mode: str, max_steps: int = 4) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.grpo.interrupted_run", str(folder), mode, str(max_steps)],
        cwd=_REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=_TIMEOUT)
    finally:
        process.kill()
    return process.returncode, output


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run_on(folder: Path, max_steps: int = 4) -> dict[str, torch.Tensor]:
    """Runs, or goes on, to the end; the weights."""
    code, output = ended(start(folder, "free", max_steps))
    assert code == 0, output
    found: dict[str, torch.Tensor] = torch.load(folder / "weights.pt")
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, torch.Tensor]:
    return run_on(tmp_path_factory.mktemp("whole"))


def check_goes_on(folder: Path, steps: list[int], uninterrupted: dict[str, torch.Tensor]) -> None:
    found = run_on(folder)
    assert [int(line) for line in (folder / "steps").read_text().split()] == steps
    state = json.loads((folder / "output" / "checkpoint-4" / "rollout_state.json").read_text())
    assert state["worker"]["first_undone"] == 8, "four steps of two prompts, each once"
    for name, tensor in uninterrupted.items():
        assert_output_close(found[name], tensor, torch.float32)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(("mode", "sign", "step"), [("waiting", "two steps", 2), ("training", "in the third step", 3)])
def test_told_to_stop(mode, sign, step, number, tmp_path, uninterrupted):
    process = start(tmp_path, mode)
    wait_for(tmp_path / sign, process)
    if mode == "waiting":
        time.sleep(0.3)  # until it waits for a sample that never comes
    told = time.monotonic()
    process.send_signal(number)
    code, output = ended(process)
    assert code == (143 if number == signal.SIGTERM else -signal.SIGINT), output
    assert time.monotonic() - told < 15
    assert number.name in output
    assert not is_alive(int((tmp_path / "child").read_text()))
    checkpoints = [path.name for path in (tmp_path / "output").glob("checkpoint-*")]
    assert checkpoints == [f"checkpoint-{step}"]
    check_goes_on(tmp_path, [1, 2, 3, 4], uninterrupted)


def test_killed(tmp_path, uninterrupted):
    """In its third step: what was done since the last checkpoint is done again, and nothing else."""
    process = start(tmp_path, "killed")
    wait_for(tmp_path / "in the third step", process)
    process.kill()
    # The fake's child does not look after its parent.
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    ended(process)
    check_goes_on(tmp_path, [1, 2, 3, 4], uninterrupted)
