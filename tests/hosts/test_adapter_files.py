"""Adapter files: written whole or not at all, and refused with a way out when they are not what they should be."""

from __future__ import annotations

import copy
import json
import os

import peft.peft_model
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.families import build, randomise_factors
from trl_moe_ext import MoeEsftConfig, MoeLoraConfig
from trl_moe_ext.errors import AdapterFileError, ConfigError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def model():
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3))
    randomise_factors(model)
    return model


@pytest.fixture
def adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(adapter, change):
    # Copies: the file that load_file maps into memory is about to be replaced.
    tensors = {name: tensor.clone() for name, tensor in load_file(adapter / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


def test_nothing_but_the_adapter_is_left(model, adapter):
    assert {p.name for p in adapter.iterdir()} == {WEIGHTS, "adapter_config.json", "README.md"}
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def test_a_failed_save_leaves_the_old_adapter_whole(model, adapter, monkeypatch):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}
    randomise_factors(model.to(torch.float64))

    def fail(tensors, file, metadata):
        with open(file, "wb") as half:
            half.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(peft.peft_model, "safe_save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(adapter)
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    assert [p.name for p in adapter.parent.iterdir()] == ["adapter"]


def test_the_users_model_card_is_kept(model, adapter):
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\nMy own words.\n")
    model.save_pretrained(adapter)
    assert "My own words." in (adapter / "README.md").read_text()


def test_several_adapters_are_saved_in_directories_of_their_own(model, tmp_path):
    model.add_adapter("second", MoeLoraConfig(r=2))
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / WEIGHTS).exists()
    assert (tmp_path / "both" / "second" / WEIGHTS).exists()


def test_pickles_are_neither_written_nor_read(model, adapter):
    with pytest.raises(ConfigError, match="safetensors only"):
        model.save_pretrained(adapter, safe_serialization=False)
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    os.remove(adapter / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"has no adapter_model.safetensors \(found: .*adapter_model.bin"):
        PeftModel.from_pretrained(build("qwen3_moe"), adapter)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
def test_a_truncated_file(adapter, keep):
    content = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors \([\d,]+ bytes\) is damaged or cut off"):
        PeftModel.from_pretrained(build("qwen3_moe"), adapter)


def test_a_missing_tensor_is_never_silently_left_at_its_random_start(adapter):
    rewrite(adapter, lambda tensors: tensors.pop("base_model.model.model.layers.1.mlp.experts.lora_B.down_proj"))
    with pytest.raises(
        AdapterFileError, match=r"missing from the file: .*layers.1.mlp.experts.lora_B.default.down_proj"
    ):
        PeftModel.from_pretrained(build("qwen3_moe"), adapter)


def test_an_adapter_of_another_model_names_keys_and_shapes(adapter, model):
    model.add_adapter("other", MoeLoraConfig(r=5))
    shapes = r"of another shape: .*gate_up_proj \(8, 3, 64\) instead of \(8, 5, 64\)"
    with pytest.raises(AdapterFileError, match=shapes):
        model.load_adapter(adapter, "other")
    with pytest.raises(AdapterFileError, match=r"does not fit DeepseekV3ForCausalLM: .*no module to adapt is called"):
        PeftModel.from_pretrained(build("deepseek_v3"), adapter)


def test_nan_in_an_adapter(adapter):
    def spoil(tensors):
        tensors["base_model.model.model.layers.0.mlp.experts.lora_A.gate_up_proj"][3, 1, 5] = float("nan")

    rewrite(adapter, spoil)
    with pytest.raises(AdapterFileError, match=r"NaN or infinite values: in: .*layers.0.mlp.experts.lora_A"):
        PeftModel.from_pretrained(build("qwen3_moe"), adapter)


@pytest.mark.parametrize("fault", ["missing", "nan", "truncated"])
def test_transformers_own_loading_refuses_the_same_files(model, tmp_path, fault):
    build("qwen3_moe").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.down_proj"
    weights = tmp_path / "adapter" / WEIGHTS
    if fault == "missing":
        rewrite(tmp_path / "adapter", lambda tensors: tensors.pop(key))
    elif fault == "nan":
        rewrite(tmp_path / "adapter", lambda tensors: tensors[key].fill_(float("nan")))
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    message = {"missing": "missing from the file", "nan": "NaN", "truncated": "damaged or cut off"}[fault]
    with pytest.raises(AdapterFileError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


CHOSEN = {f"model.layers.{layer}.mlp.experts": [2, 5] for layer in range(2)}
# An adapter of chosen experts, and what the names of its weights begin with.
OF_CHOSEN_EXPERTS = {
    "moe_lora": (MoeLoraConfig(r=3, selected_experts=CHOSEN, rank_pattern={r"layers.0.mlp.experts.5": 6}), "lora_A"),
    "moe_esft": (MoeEsftConfig(selected_experts=CHOSEN), "esft_delta"),
}


def saved_of_chosen_experts(kind, folder):
    """Saved in `folder` beside its base model, and live."""
    torch.manual_seed(0)
    build("qwen3_moe").save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, copy.deepcopy(OF_CHOSEN_EXPERTS[kind][0])).eval()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize("kind", OF_CHOSEN_EXPERTS)
def test_transformers_own_loading_of_chosen_experts(kind, tmp_path):
    model = saved_of_chosen_experts(kind, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    tokens = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("fault", ["missing", "nan", "no indices", "truncated"])
@pytest.mark.parametrize("kind", OF_CHOSEN_EXPERTS)
def test_transformers_own_loading_refuses_files_of_chosen_experts(kind, fault, tmp_path):
    saved_of_chosen_experts(kind, tmp_path)
    weight = OF_CHOSEN_EXPERTS[kind][1]
    experts = "base_model.model.model.layers.1.mlp.experts."
    key, indices = f"{experts}{weight}.down_proj", f"{experts}{weight.partition('_')[0]}_selected.experts"
    file = tmp_path / "adapter" / WEIGHTS
    change, message = {
        "missing": (lambda: rewrite(file.parent, lambda tensors: tensors.pop(key)), "missing from the file"),
        "nan": (lambda: rewrite(file.parent, lambda tensors: tensors[key].fill_(float("nan"))), "NaN"),
        "no indices": (lambda: rewrite(file.parent, lambda tensors: tensors.pop(indices)), "missing from the file"),
        "truncated": (lambda: file.write_bytes(file.read_bytes()[:1000]), "damaged or cut off"),
    }[fault]
    change()
    with pytest.raises(AdapterFileError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_stock_adapters_take_pefts_own_path(tmp_path):
    stock = get_peft_model(build("qwen3_moe"), LoraConfig(target_modules=["q_proj"]))
    stock.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)


def test_the_saved_type_is_ours(adapter):
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "MOE_LORA"
