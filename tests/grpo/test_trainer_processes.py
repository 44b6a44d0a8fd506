"""Two data-parallel processes, one of which has the generator, train as one process does on all samples."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.grpo import two_processes
from tests.tolerances import assert_output_close

pytestmark = pytest.mark.distributed

_REPOSITORY = Path(__file__).parents[2]
_TIMEOUT = 300  # seconds; two imports of trl on two busy cores take one minute


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*command, "-m", "tests.grpo.two_processes", str(folder)],
        cwd=_REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
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
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)], folder


def _end_group(leader: int) -> None:
    """The launcher and its workers, which are a group of their own, whatever state they are in."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def test_as_one_process(both, tmp_path):
    found, folder = both
    alone = two_processes.run(tmp_path, 8)
    assert alone["processes"] == 1
    for process in found:
        assert process["processes"] == 2
        assert process["version"] == alone["version"] == 3
        assert process["losses"] == pytest.approx(alone["losses"], rel=1e-4, abs=1e-6)
        assert process["ess"] == pytest.approx(alone["ess"], rel=1e-3)
        for name, tensor in alone["weights"].items():
            assert_output_close(process["weights"][name], tensor, torch.float32)
    assert (folder / "run" / "checkpoint-2" / "rollout_state.json").is_file()
