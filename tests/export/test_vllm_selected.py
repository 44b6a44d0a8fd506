"""vLLM's layout of adapters of some experts, with ranks that differ: the same change, in files that vLLM can stack."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import trl_moe_ext.export.vllm_tensors
from tests.families import build, randomise_factors
from trl_moe_ext.errors import AdapterFileError
from trl_moe_ext.experts.layout import weight_view
from trl_moe_ext.export.vllm import convert_adapter, export_adapter
from trl_moe_ext.export.vllm_decoder import expert_deltas
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts

WEIGHTS = "adapter_model.safetensors"
SELECTED = [1, 4, 6]
RANKS = {4: 2, 6: 8}  # the others have 4


@pytest.fixture(autouse=True)
def _hub_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def adapted(model_type: str, **options) -> PeftModel:
    """Three experts with ranks of their own in the first layer of experts, one rank of all in the others."""
    model = build(model_type)
    names = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    options = {
        "expert_r": 4,
        "expert_alpha": 5,
        "r": 3,
        "selected_experts": dict.fromkeys(names, SELECTED),
        "rank_pattern": {f"{names[0]}.{expert}": rank for expert, rank in RANKS.items()},
    } | options
    model = get_peft_model(model, MoeLoraConfig(**options))
    randomise_factors(model)
    return model


def merged_changes(model: PeftModel) -> list[dict[str, torch.Tensor]]:
    """What merging changes in each module of experts: gate, up and down ``(E, out, in)``."""
    model = copy.deepcopy(model).double()
    found = []
    for layer in (module for module in model.modules() if isinstance(module, MoeLoraExperts)):
        base, layout = layer.get_base_layer(), layer.layout
        before = {p.name: weight_view(base, p, layout).clone() for p in layout.projections}
        layer.merge()
        with torch.no_grad():
            up, down = ((weight_view(base, p, layout) - before[p.name]).mT.float() for p in layout.projections)
        gate_up = (up[:, ::2], up[:, 1::2]) if layout.is_interleaved else up.chunk(2, dim=1)
        found.append({"gate": gate_up[0], "up": gate_up[1], "down": down})
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for part in expected:
        torch.testing.assert_close(found[part], expected[part], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_the_decoder_reads_what_merging_changes(model_type, rslora, tmp_path):
    model = adapted(model_type, use_rslora=rslora)
    writer = export_adapter(model, tmp_path)
    found, expected = list(expert_deltas(tmp_path).values()), merged_changes(model)
    assert len(found) == len(expected) == 2
    for deltas, merged in zip(found, expected):
        assert_same(deltas, merged)
        for part in deltas.values():
            assert [expert for expert, delta in enumerate(part) if delta.any()] == SELECTED
    assert writer.rank == 8


def test_all_experts_of_a_module_have_factors_of_one_shape(tmp_path):
    """vLLM stacks them."""
    export_adapter(adapted("qwen3_moe"), tmp_path)
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for key, tensor in load_file(tmp_path / WEIGHTS).items():
        if ".experts." in key:
            shapes.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.*.", key), set()).add(tuple(tensor.shape))
    assert {len(found) for found in shapes.values()} == {1}
    ranks = {key: next(iter(found))[0] for key, found in shapes.items() if key.endswith("lora_A.weight")}
    assert {rank for key, rank in ranks.items() if ".0." in key} == {8}
    assert {rank for key, rank in ranks.items() if ".1." in key} == {4}


def test_a_saved_adapter_gives_the_same_files_as_the_live_one(tmp_path):
    model = adapted("qwen3_moe")
    model.get_base_model().save_pretrained(tmp_path / "base")  # for its config
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "saved"))
    export_adapter(model, tmp_path / "live")
    convert_adapter(tmp_path / "saved", tmp_path / "converted")
    live, converted = (load_file(tmp_path / name / WEIGHTS) for name in ("live", "converted"))
    assert live.keys() == converted.keys()
    assert all(torch.equal(live[key], converted[key]) for key in live)


def test_factors_of_other_experts_are_refused(tmp_path):
    """Their shapes are the same."""
    model = adapted("qwen3_moe")
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "saved"))
    file: Path = tmp_path / "saved" / WEIGHTS
    state = load_file(file)
    key = next(key for key in state if ".1." in key and key.endswith("lora_selected.experts"))
    save_file(state | {key: state[key] + 1}, file)
    with pytest.raises(AdapterFileError, match=r"lora_selected\.experts is \[2, 5, 7\] instead of \[1, 4, 6\]"):
        convert_adapter(tmp_path / "saved", tmp_path / "converted")


def test_one_scaling_for_all_ranks_does_not_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_moe_ext.export.vllm_tensors, "_scaled", lambda B, factor: B)
    with pytest.raises(AdapterFileError, match="the largest difference"):
        export_adapter(adapted("qwen3_moe"), tmp_path)
