"""accelerate's loading of a sharded model: buffers come with it, and where there are none it is accelerate's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import fsdp_utils
from torch import Tensor, nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.hosts.processes import run_python
from trl_moe_ext.errors import HostVersionError
from trl_moe_ext.hosts import accelerate_fsdp2

WRAPPED = fsdp_utils.fsdp2_load_full_state_dict
STOCK = WRAPPED.__wrapped__
ACCELERATOR = SimpleNamespace(is_main_process=True, device=torch.device("cpu"))


class Model(nn.Module):
    """With buffers of three kinds, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.first.register_buffer("indices", torch.tensor([5, 2, 9]))
        self.first.register_buffer("bias_of_choice", torch.tensor([0.5, -0.25], dtype=torch.float64))
        self.first.register_buffer("frequencies", torch.arange(3.0), persistent=False)
        self.second = self.first


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """One process, which is the first and the last."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


def sharded(model: nn.Module, policy: OffloadPolicy | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model as accelerate has it before it is filled, and what it is to be filled with."""
    full = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return fully_shard(model.to("meta"), offload_policy=policy or OffloadPolicy()), full


def assert_filled(model: nn.Module, full: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == full.keys()
    for name, tensor in full.items():
        found = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name


def test_accelerate_cannot_do_it_itself() -> None:
    """When this fails, the seam has done its work."""
    model, full = sharded(Model())
    with pytest.raises(AttributeError, match="device_mesh"):
        STOCK(ACCELERATOR, model, full)


@pytest.mark.parametrize(
    "policy", [OffloadPolicy(), CPUOffloadPolicy(pin_memory=False)], ids=["on the device", "offloaded"]
)
def test_buffers_are_loaded(policy: OffloadPolicy) -> None:
    model, full = sharded(Model(), policy)
    offloads = isinstance(policy, CPUOffloadPolicy)
    assert WRAPPED(ACCELERATOR, model, full, cpu_offload=offloads) is model
    assert_filled(model, full)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert model.second.indices is model.first.indices
    # accelerate sees to these itself.
    assert model.first.frequencies.is_meta


def test_what_is_loaded_is_used() -> None:
    """The parameters are those that FSDP gathers, so that the model runs."""
    reference = Model()
    expected = reference.first(torch.ones(1, 4)).detach()
    model, full = sharded(reference)
    WRAPPED(ACCELERATOR, model, full)
    model.forward = lambda x: model.first(x)
    assert torch.equal(model(torch.ones(1, 4)), expected)


def test_parameters_that_fsdp_ignores_are_loaded() -> None:
    model = Model().to("meta")
    full = Model().state_dict()
    fully_shard(model, ignored_params={model.first.bias})
    WRAPPED(ACCELERATOR, model, full)
    assert_filled(model, full)
    assert isinstance(model.first.bias, nn.Parameter)


def test_without_buffers_it_is_accelerates_own() -> None:
    model, full = sharded(nn.Sequential(nn.Linear(4, 4)))
    assert calls_of(model, full, handles=False) == [(ACCELERATOR, model, full, True)]


def test_an_accelerate_that_loads_buffers_is_left_alone() -> None:
    model, full = sharded(Model())
    probed, called = calls_of(model, full, handles=True)
    assert called == (ACCELERATOR, model, full, True)
    assert [*probed[1].state_dict()] == ["0.buffer"]


def test_another_failure_is_not_taken_for_this_one() -> None:
    model, full = sharded(Model())
    wrapped = accelerate_fsdp2._with_buffers(lambda _, model, *others: model.nothing_of_the_kind)
    with pytest.raises(AttributeError, match=r"FSDPModel.*nothing_of_the_kind"):  # of the model, not of the probe
        wrapped(ACCELERATOR, model, full)


def calls_of(model: nn.Module, full: dict[str, Tensor], handles: bool) -> list[tuple[Any, ...]]:
    """The arguments of every call of a stand-in for accelerate's function, which has to be called with the offload."""
    calls = []

    def load(*arguments: Any) -> None:
        calls.append(arguments)
        if not handles:
            STOCK(*arguments)

    accelerate_fsdp2._with_buffers(load)(ACCELERATOR, model, full, True)
    return calls


def test_installed_once() -> None:
    accelerate_fsdp2.install()
    assert fsdp_utils.fsdp2_load_full_state_dict is WRAPPED
    assert not hasattr(STOCK, "trl_moe_ext")


def test_another_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp_utils, "fsdp2_load_full_state_dict", lambda accelerator, model, state: model)
    with pytest.raises(HostVersionError, match=r"accelerate .*full_state_dict does not take full_sd\. Install"):
        accelerate_fsdp2.install()


@pytest.mark.parametrize("disabled", ["0", "1"])
@pytest.mark.parametrize("first", ["import torch", "import accelerate", "import trl"])
def test_autoload(first: str, disabled: str, tmp_path: Path) -> None:
    """In both modules that have the name, whatever is imported first."""
    code = f"""
{first}
import accelerate.utils, accelerate.utils.fsdp_utils
places = accelerate.utils, accelerate.utils.fsdp_utils
found = [hasattr(place.fsdp2_load_full_state_dict, "trl_moe_ext") for place in places]
assert found == [{disabled == "0"}] * 2, found
"""
    done = run_python(code, tmp_path, {"TRL_MOE_EXT_DISABLE": disabled})
    assert "trl_moe_ext leaves" not in done.stderr
