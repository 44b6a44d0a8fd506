"""Two data-parallel processes make the loss, the gradients and the log of one process on the joined batch."""

from __future__ import annotations

import pytest
import torch

from tests.sft import two_processes
from tests.sft.runs import joined
from tests.sft.yardstick import expected
from tests.tolerances import RELATIVE_ERROR, assert_gradient_close
from tests.torchrun import torchrun

pytestmark = pytest.mark.distributed

_COEFFICIENTS = {"load_balancing": 0.5, "z_loss": 0.1, "drift_kl": 2.0}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes have seen, case by case."""
    folder = tmp_path_factory.mktemp("two")
    torchrun("tests.sft.two_processes", str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module", params=two_processes.CASES)
def case(request, results, tmp_path_factory):
    """Both processes, and one on the joined batch."""
    options = two_processes.CASES[request.param] | {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    return [of[request.param] for of in results], two_processes.run(tmp_path_factory.mktemp("one"), options)


def test_loss_and_gradients(case):
    both, alone = case
    assert alone["processes"] == 1
    for process in both:
        assert process["processes"] == 2
        assert process["losses"] == pytest.approx(alone["losses"], rel=RELATIVE_ERROR[torch.float32][0])
        assert len(process["gradients"]) == len(alone["gradients"]) >= 2
        for found, wanted in zip(process["gradients"], alone["gradients"], strict=True):
            assert found.keys() == wanted.keys()
            for name, gradient in wanted.items():
                assert_gradient_close(found[name], gradient, torch.float32, name)


def test_biases(case):
    """Those of every process are moved alike: they are no gradients, which would be averaged."""
    both, alone = case
    for process in both:
        assert process["biases"].keys() == alone["biases"].keys()
        assert all(torch.equal(process["biases"][label], bias) for label, bias in alone["biases"].items())


def test_what_is_logged(case):
    """The metrics are those of all processes, in every process the same."""
    both, alone = case
    for process in both:
        assert process["log"].keys() == alone["log"].keys()
        for name, values in alone["log"].items():
            assert process["log"][name] == pytest.approx(values, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("case", ["at once"], indirect=True)
def test_counts_of_one_process_would_be_noticed(case, results):
    _, alone = case
    wrong = [of["unreduced"] for of in results]
    assert wrong[0]["losses"] != pytest.approx(alone["losses"], rel=1e-3)
    assert wrong[0]["log"]["router/max_vio"] != pytest.approx(alone["log"]["router/max_vio"], rel=1e-3)


@pytest.mark.parametrize("case", ["at once"], indirect=True)
def test_one_process_is_what_was_computed_independently(case, tmp_path):
    """The other side of the comparison is no moving target."""
    _, alone = case
    torch.manual_seed(0)
    trainer = two_processes.sft(tmp_path)
    loss, gradients = expected(trainer.model, joined(two_processes.rows(8)), _COEFFICIENTS)
    assert alone["losses"][0] == pytest.approx(loss, rel=RELATIVE_ERROR[torch.float32][0])
    for name, gradient in gradients.items():
        assert_gradient_close(alone["gradients"][0][name], gradient, torch.float32, name)
