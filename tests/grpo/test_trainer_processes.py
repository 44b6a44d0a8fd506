"""Two data-parallel processes, one of which has the generator, train as one process does on all samples."""

from __future__ import annotations

import pytest
import torch

from tests.grpo import two_processes
from tests.tolerances import assert_output_close
from tests.torchrun import torchrun

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torchrun("tests.grpo.two_processes", str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)], folder


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
