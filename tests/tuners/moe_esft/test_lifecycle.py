"""PEFT's verbs on experts that are trained in full: add, switch, disable, delete, merge, unmerge, save, load."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families import build, inputs
from tests.tolerances import assert_output_close, relative_error
from trl_moe_ext.errors import AdapterFileError
from trl_moe_ext.experts.census.esft_checks import randomise_deltas
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig, MoeEsftExperts, MoeEsftLinear

BATCH = inputs("qwen3_moe")
LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
FIRST = {LAYERS[0]: [1, 3], LAYERS[1]: [0, 5]}
SECOND = {LAYERS[0]: [3, 4], LAYERS[1]: [7]}


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def config(selected=None, **options) -> MoeEsftConfig:
    return MoeEsftConfig(**{"moe_target": ["experts", "attention"], "selected_experts": selected or FIRST} | options)


@pytest.fixture
def model():
    model = get_peft_model(build("qwen3_moe"), config()).eval()
    randomise_deltas(model, "default", seed=3)
    return model


@pytest.fixture
def base_dir(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def layers(model, kind=MoeEsftExperts):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_only_deltas_of_the_chosen_experts_and_of_attention_are_trained(model):
    trained = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".esft_delta.default." in name for name in trained)
    shapes = {name: tuple(p.shape) for name, p in trained.items() if "experts" in name}
    one = {"gate_up_proj": (64, 64), "down_proj": (64, 32)}
    assert shapes == {
        f"{layer}.esft_delta.default.{name}": (2, *shape) for layer in LAYERS for name, shape in one.items()
    }
    assert {name.split(".")[4] for name in trained if "self_attn" in name} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_disabling_gives_the_base_model_exactly(model):
    expected = logits(build("qwen3_moe"))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    assert relative_error(logits(model), expected) > 1e-3


def test_adapters_of_different_experts_act_together_and_merge(model):
    first = logits(model)
    model.add_adapter("second", config(SECOND, moe_target=["experts"]))
    randomise_deltas(model, "second", seed=5)
    assert_output_close(logits(model), first, torch.float32)
    model.base_model.set_adapter(["default", "second"])
    together = logits(model)
    assert relative_error(together, first) > 1e-3
    assert_output_close(logits(model.merge_and_unload(adapter_names=["default", "second"])), together, torch.float32)


def test_gradients_reach_every_active_adapter(model):
    model.add_adapter("second", config(SECOND, moe_target=["experts"]))
    model.base_model.set_adapter(["default", "second"])
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    layer = layers(model)[0]
    ours, theirs = (layer.esft_delta[name].down_proj.grad for name in ("default", "second"))
    # Both train expert 3, whose gradient is that of the sum.
    torch.testing.assert_close(ours[1], theirs[0])
    assert theirs[0].any()


def test_deleting_one_of_two_adapters_leaves_the_other(model):
    expected = logits(model)
    model.add_adapter("second", config(SECOND))
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    assert all(layer.selections.keys() == {"default"} for layer in layers(model))
    assert_output_close(logits(model), expected, torch.float32)


def test_one_projection_alone(model):
    model.add_adapter("down", config(expert_projections="down", moe_target=["experts"]))
    randomise_deltas(model, "down", seed=5)
    model.set_adapter("down")
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"down_proj"}
    expected = logits(model)
    assert_output_close(logits(model.merge_and_unload(adapter_names=["down"])), expected, torch.float32)


@pytest.mark.parametrize("part", ["experts", "a Linear"])
def test_a_safe_merge_checks_every_layer_before_it_changes_one(model, part):
    layer = layers(model, MoeEsftExperts if part == "experts" else MoeEsftLinear)[-1]
    next(layer.esft_delta["default"].parameters()).data.view(-1)[5] = float("nan")
    before = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterFileError, match="nothing was merged"):
            merge(safe_merge=True)
        assert not any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_the_file_holds_the_deltas_of_the_chosen_experts_and_which_they_are(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * (2 + 1 + 4)
    stem = f"base_model.model.{LAYERS[0]}"
    assert tensors[f"{stem}.esft_selected.experts"].tolist() == FIRST[LAYERS[0]]
    assert tensors[f"{stem}.esft_delta.gate_up_proj"].shape == (2, 64, 64)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["selected_experts"]) == ("MOE_ESFT", FIRST)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_give_the_same_logits_to_the_last_bit(model, base_dir, tmp_path, low_cpu_mem_usage):
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(base_dir)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_every_way_of_loading_gives_the_same_logits(model, base_dir, tmp_path):
    model.peft_config["default"].base_model_name_or_path = str(base_dir)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    for load in (AutoPeftModelForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        torch.testing.assert_close(logits(load(tmp_path / "adapter").eval()), expected, rtol=0, atol=0)


def test_an_adapter_of_other_experts_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{LAYERS[0]}.esft_selected.experts"] += 1
    save_file(tensors, file)
    with pytest.raises(AdapterFileError, match=r"of other experts .*\[2, 4\] instead of \[1, 3\]"):
        PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)


def test_a_router_is_trained_as_a_copy(tmp_path):
    model = get_peft_model(build("qwen3_moe"), config(moe_target=["experts"], modules_to_save=["mlp.gate"])).eval()
    model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    copies = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(copies) == 2
    with torch.no_grad():
        for router in copies.values():
            assert router.grad is not None
            router.mul_(1.5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert_output_close(logits(model.merge_and_unload()), logits(loaded), torch.float32)
