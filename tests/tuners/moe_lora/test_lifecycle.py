"""PEFT's verbs on an adapter of routed experts: add, switch, disable, delete, merge, unmerge, save, load."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, inspect_matched_modules
from transformers import AutoModelForCausalLM

from tests.families import build, inputs, randomise_factors
from tests.tolerances import assert_output_close, relative_error
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import AdapterFileError, ConfigError, LayoutError
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.reference import experts_mlp_reference
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts

BATCH = inputs("qwen3_moe")


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.fixture
def model():
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3)).eval()
    randomise_factors(model)
    return model


@pytest.fixture
def base_dir(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def experts_layer(model) -> MoeLoraExperts:
    return next(m for m in model.modules() if isinstance(m, MoeLoraExperts))


def test_only_factors_are_trainable(model):
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert any("experts.lora_A.default.gate_up_proj" in name for name in trainable)


def test_disabling_gives_the_base_model_exactly(model):
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(build("qwen3_moe")), rtol=0, atol=0)
    assert relative_error(logits(model), logits(build("qwen3_moe"))) > 1e-3


def test_two_adapters_switch_and_act_together(model):
    first = logits(model)
    model.add_adapter("second", MoeLoraConfig(r=5, lora_alpha=3))
    randomise_factors(model, "second")
    assert_output_close(logits(model), first, torch.float32)
    model.set_adapter("second")
    second = logits(model)
    assert relative_error(second, first) > 1e-3
    model.base_model.set_adapter(["default", "second"])
    together = logits(model)
    assert min(relative_error(together, first), relative_error(together, second)) > 1e-3
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    assert_output_close(logits(merged), together, torch.float32)


def test_deleting_one_of_two_adapters_leaves_the_other(model):
    expected = logits(model)
    model.add_adapter("second", MoeLoraConfig(r=5))
    model.delete_adapter("second")
    assert not any(".second." in name for name, _ in model.named_parameters())
    assert_output_close(logits(model), expected, torch.float32)


def test_adapters_may_adapt_different_projections(model):
    model.add_adapter("down", MoeLoraConfig(r=2, expert_projections="down", moe_target=["experts"]))
    randomise_factors(model, "down")
    model.set_adapter("down")
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if ".down." in n and p.requires_grad}
    assert names == {"down_proj"}
    expected = logits(model)
    assert_output_close(logits(model.merge_and_unload(adapter_names=["down"])), expected, torch.float32)


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unmerge_come_back_to_the_same_weights(model, safe):
    unmerged, weight = logits(model), experts_layer(model).gate_up_proj.clone()
    model.merge_adapter(safe_merge=safe)
    assert_output_close(logits(model), unmerged, torch.float32)
    assert relative_error(experts_layer(model).gate_up_proj, weight) > 1e-3
    model.unmerge_adapter()
    assert_output_close(experts_layer(model).gate_up_proj, weight, torch.float32)


def test_a_safe_merge_of_a_broken_adapter_changes_nothing(model):
    layer = experts_layer(model)
    weights = {name: p.clone() for name, p in layer.base_layer.named_parameters()}
    layer.lora_A["default"].down_proj.data[2, 0, 0] = float("nan")
    with pytest.raises(AdapterFileError, match="not finite"):
        layer.merge(safe_merge=True)
    for name, p in layer.base_layer.named_parameters():
        torch.testing.assert_close(p, weights[name], rtol=0, atol=0)


def test_a_safe_merge_checks_every_layer_before_it_changes_one(model):
    last = [m for m in model.modules() if isinstance(m, MoeLoraExperts)][-1]
    last.lora_B["default"].down_proj.data[0, 0, 0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterFileError, match="nothing was merged"):
            merge(safe_merge=True)
        assert not any(m.merged for m in model.modules() if isinstance(m, BaseTunerLayer))


def test_each_adapter_keeps_its_kernel():
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(kernel="reference"))
    model.add_adapter("second", MoeLoraConfig())
    kernels = experts_layer(model).kernels
    assert kernels["default"] is experts_mlp_reference
    assert kernels["second"].func is fused_experts_mlp


def test_offloaded_experts_are_an_error_and_not_garbage(model):
    with pytest.raises(LayoutError, match="the experts are on meta and their tokens on cpu: offloaded"):
        cpu_offload(model, execution_device=torch.device("cpu"))(**BATCH)


def test_a_copy_of_the_model_is_a_model_of_its_own(model):
    twin = copy.deepcopy(model)
    randomise_factors(model.add_adapter("second", MoeLoraConfig(r=2)) or model, "second")
    assert inspect_matched_modules(twin.base_model)["matched"]
    torch.testing.assert_close(logits(twin), logits(model), rtol=0, atol=0)


def test_a_second_adapter_inside_a_saved_module_is_refused():
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(modules_to_save=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj|ModulesToSave"):
        model.add_adapter("second", MoeLoraConfig(r=2))


def test_merging_in_bfloat16_rounds_once(model):
    layer = experts_layer(model)
    layer.base_layer.to(torch.bfloat16)
    weight = layer.gate_up_proj.double()
    A, B = (f["default"].gate_up_proj.double() for f in (layer.lora_A, layer.lora_B))
    layer.merge()
    expected = weight + layer.scaling["default"] * (B @ A)
    # Equal but for the double rounding through float32 of a few elements.
    assert (layer.gate_up_proj.double() != expected.bfloat16().double()).double().mean() < 1e-3


def test_mixed_batches_and_weighted_adapters_are_refused(model):
    model.add_adapter("second", MoeLoraConfig(r=3))
    with pytest.raises(ConfigError, match="adapter_names"):
        model(**BATCH, adapter_names=["default", "second"])
    with pytest.raises(ConfigError, match="set_adapter"):
        model.base_model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mix")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_give_the_same_logits_to_the_last_bit(model, base_dir, tmp_path, low_cpu_mem_usage):
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_every_way_of_loading_gives_the_same_logits(model, base_dir, tmp_path):
    model.base_model.model.name_or_path = str(base_dir)
    model.peft_config["default"].base_model_name_or_path = str(base_dir)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    for load in (AutoPeftModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        torch.testing.assert_close(logits(load(tmp_path / "adapter").eval()), expected, rtol=0, atol=0)


def test_a_fresh_process_loads_the_adapter_without_importing_this_package(model, base_dir, tmp_path):
    model.peft_config["default"].base_model_name_or_path = str(base_dir)
    model.save_pretrained(tmp_path / "adapter")
    code = (
        "import torch; from peft import AutoPeftModelForCausalLM as A;"
        f"m = A.from_pretrained({str(tmp_path / 'adapter')!r}).eval();"
        f"torch.save(m(input_ids=torch.tensor({BATCH['input_ids'].tolist()})).logits, {str(tmp_path / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), rtol=0, atol=0)


def test_the_saved_config_does_not_name_the_kernel(model, tmp_path):
    """The kernel is how this machine computes: an adapter must load where a third-party kernel is not installed."""
    model.save_pretrained(tmp_path)
    assert "kernel" not in (tmp_path / "adapter_config.json").read_text()


def test_the_router_is_adapted_only_when_asked_for():
    plain = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3))
    assert not any("mlp.gate" in n for n, p in plain.named_parameters() if p.requires_grad)
    asked = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3, lora_dropout=0.1, moe_target=["experts", "router"]))
    assert any("mlp.gate" in n for n, p in asked.named_parameters() if p.requires_grad)
    asked(**BATCH).logits.sum().backward()
    assert all(p.grad is not None for n, p in asked.named_parameters() if p.requires_grad)
