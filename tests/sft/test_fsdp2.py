"""Two processes with TRL's `fsdp2.yaml` train what one process trains, also where models and adapters have buffers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import trl
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import build
from tests.sft import sharded_processes
from tests.sft.runs import joined, rows
from tests.tolerances import assert_output_close, relative_error
from tests.torchrun import torchrun
from trl_moe_ext.profiles.measure import measure_profile

pytestmark = pytest.mark.distributed

# Of the weights after four steps, whose gradients are sums in another order; Adam divides by their size.
_AFTER_STEPS = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The models, a profile, and what two processes make of them."""
    folder = tmp_path_factory.mktemp("fsdp2")
    for model in {model for model, *_ in sharded_processes.CASES.values()}:
        build(model).save_pretrained(folder / model)
    batch = joined(rows(20))
    seen = {name: batch[name] for name in ("input_ids", "attention_mask")}
    measure_profile(build("qwen3_moe"), [seen]).save(folder / "profile.json")
    torchrun("tests.sft.sharded_processes", str(folder), env=environment())
    return folder


def environment() -> dict[str, str]:
    """What `accelerate launch` makes of TRL's own file, without its mixed precision."""
    file = Path(trl.__file__).parent / "accelerate_configs" / "fsdp2.yaml"
    options = yaml.safe_load(file.read_text())["fsdp_config"]
    assert options["fsdp_version"] == 2
    assert options["fsdp_cpu_ram_efficient_loading"] is True
    return {"ACCELERATE_USE_FSDP": "true"} | {name.upper(): str(value) for name, value in options.items()}


@pytest.fixture(scope="module")
def results(folder):
    """What the two processes have seen, case by case."""
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module", params=sharded_processes.CASES)
def case(request, folder, results):
    """Name of a case, what both processes saw, and what one process sees without FSDP."""
    alone = sharded_processes.run(request.param, folder, folder / "one" / request.param, batch=8)
    return request.param, [of[request.param] for of in results], alone


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_losses(case):
    _, both, alone = case
    assert alone["processes"] == 1
    assert alone["sharded"] == 0
    for process in both:
        assert process["processes"] == 2
        assert process["sharded"] > 20
        assert process["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_buffers(case):
    """Every process has those of the model that was loaded, though all but the first had none."""
    _, both, alone = case
    for process in both:
        assert process["buffers"]
        for name, buffer in process["buffers"].items():
            assert buffer.dtype == alone["buffers"][name].dtype
            assert torch.equal(buffer, alone["buffers"][name])
        assert process["differences"].keys() == alone["differences"].keys()
        assert not any(process["differences"].values())


def test_saved_adapter(case, folder):
    name, _, _ = case
    found, wanted = adapter(folder / "two" / name), adapter(folder / "one" / name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if tensor.is_floating_point():
            # A balanced bias is zero.
            assert torch.equal(found[key], tensor) or relative_error(found[key], tensor) < _AFTER_STEPS, key
        else:
            assert torch.equal(found[key], tensor), key


def test_saved_adapter_loads_again(case, folder):
    name, _, _ = case
    model = folder / sharded_processes.CASES[name].model
    batch = joined(rows(4))
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model)
        untrained = base(**batch).logits
        found = PeftModel.from_pretrained(base, folder / "two" / name).eval()(**batch).logits
        again = AutoModelForCausalLM.from_pretrained(model)
        wanted = PeftModel.from_pretrained(again, folder / "one" / name).eval()(**batch).logits
    assert_output_close(found, wanted, torch.float32)
    assert relative_error(untrained, wanted) > 1e-3  # an adapter that was not read would be noticed


@pytest.mark.parametrize("name", sharded_processes.RESUMED)
def test_resumed_run_is_the_uninterrupted_one(name, folder, results):
    uninterrupted, resumed = adapter(folder / "two" / name), adapter(folder / "resumed" / name)
    assert all(torch.equal(resumed[key], tensor) for key, tensor in uninterrupted.items())
    for of in results:
        assert of["resumed"][name]["losses"] == of[name]["losses"]
        assert not any(of["resumed"][name]["differences"].values())
