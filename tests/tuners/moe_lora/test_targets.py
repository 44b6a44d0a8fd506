"""The user's words and the modules they mean; a word that means nothing is an error, never a part left untrained."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.experts.stacked import WithScale
from tests.families import FAMILIES, build
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError, LayoutError
from trl_moe_ext.experts import census
from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts


def adapted(config, model_type="qwen3_moe"):
    model = get_peft_model(build(model_type), config)
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def last_words(modules):
    return {name.rpartition(".")[2] for name in modules}


def tiny_llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_default_is_every_expert_and_every_attention_projection(model_type):
    modules = adapted(MoeLoraConfig(), model_type)
    anatomy = read_anatomy(census.skeleton(model_type).named_modules())
    wanted = [*anatomy.experts, *anatomy.expert_linears, *anatomy.attention]
    wanted += [name.rpartition(".")[0] for name in anatomy.parameters["attention"]]
    assert sorted(modules) == sorted(wanted)
    assert all(isinstance(modules[name], MoeLoraExperts) for name in anatomy.experts)
    rest = [name for name in modules if name not in anatomy.experts and name not in anatomy.expert_linears]
    assert not any(re.search(r"router|shared|lm_head|indexer", name) for name in rest)


def test_target_modules_choose_linears_and_experts_come_on_top():
    modules = adapted(MoeLoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert last_words(modules) == {"q_proj", "v_proj", "experts"}


def test_expert_parameters_are_as_many_as_with_target_parameters():
    ours = adapted(MoeLoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    stock = get_peft_model(
        build("qwen3_moe"),
        LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
        ),
    )
    count = sum(p.numel() for m in ours.values() for n, p in m.named_parameters(recurse=True) if "lora_" in n)
    assert count == sum(p.numel() for p in stock.parameters() if p.requires_grad)


def test_experts_can_be_left_out():
    assert last_words(adapted(MoeLoraConfig(moe_target=["attention"]))) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_experts_alone():
    assert last_words(adapted(MoeLoraConfig(moe_target=["experts"]))) == {"experts"}


def test_shared_experts_and_dense_mlp_are_words_of_their_own():
    shared = adapted(MoeLoraConfig(moe_target=["shared_experts"]), "deepseek_v3")
    assert shared
    assert all("shared_experts" in name for name in shared)
    dense = adapted(MoeLoraConfig(moe_target=["dense_mlp"]), "deepseek_v3")
    assert dense
    assert not any("shared" in name for name in dense)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "gemma4_text", "deepseek_v3", "phimoe"])
def test_the_router_when_asked_for(model_type):
    modules = adapted(MoeLoraConfig(moe_target=["router"]), model_type)
    assert modules
    assert all("router" in name or "gate" in name for name in modules)


@pytest.mark.parametrize("layers", [1, [1]])
def test_layers_to_transform_hold_for_experts_and_linears(layers):
    modules = adapted(MoeLoraConfig(layers_to_transform=layers))
    assert modules
    assert all("layers.1." in name for name in modules)


def test_exclude_modules_hold_for_experts_and_linears():
    modules = adapted(MoeLoraConfig(exclude_modules=["layers.0.mlp.experts", "q_proj"]))
    assert last_words(modules) == {"experts", "k_proj", "v_proj", "o_proj"}
    assert not any("layers.0.mlp.experts" in name for name in modules)


def test_target_parameters_of_experts_take_the_grouped_path():
    config = MoeLoraConfig(moe_target=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    modules = adapted(config)
    assert len(modules) == 2
    assert all(isinstance(m, MoeLoraExperts) for m in modules.values())


def test_target_parameters_name_one_of_three_projections():
    modules = adapted(MoeLoraConfig(moe_target=[], target_parameters=["mlp.w1"]), "dbrx")
    assert {tuple(dict(m.lora_A["default"].named_parameters())) for m in modules.values()} == {("w1",)}


def test_excluding_a_projection_of_stacks():
    for word in ("down_proj", "experts.down_proj", r".*down_proj"):
        exclude = word if "*" in word else [word]
        modules = adapted(MoeLoraConfig(moe_target=["experts"], exclude_modules=exclude))
        assert {n for m in modules.values() for n, _ in m.lora_A["default"].named_parameters()} == {"gate_up_proj"}


def test_words_name_single_projections_too():
    modules = adapted(MoeLoraConfig(moe_target=["attention"], target_modules=["kv_proj", "input_linear"]), "jetmoe")
    assert last_words(modules) == {"kv_proj", "input_linear"}


def test_a_linear_with_a_forward_of_its_own_is_adapted_by_its_weight():
    for model_type, word in (("llama4_text", "router"), ("deepseek_v4", "o_a_proj")):
        modules = adapted(MoeLoraConfig(moe_target=[], target_modules=[word]), model_type)
        assert {type(m).__name__ for m in modules.values()} == {"ParamWrapper"}


def test_what_no_gradient_reaches_is_not_adapted_by_its_name_either():
    modules = adapted(MoeLoraConfig(moe_target=[], target_modules=["gate_proj"]), "deepseek_v4")
    assert not [name for name in modules if "indexer" in name]


def test_a_dense_encoder_beside_a_sparse_decoder_is_part_of_the_model():
    model = get_peft_model(
        build("switch_transformers", encoder_sparse_step=0), MoeLoraConfig(moe_target=["attention"])
    )
    assert {n.split(".")[2] for n, m in model.named_modules() if isinstance(m, LoraLayer)} == {"encoder", "decoder"}


def test_options_of_experts_on_a_dense_model_are_an_error():
    with pytest.raises(ConfigError, match="expert_r=2 has no effect: the model has no routed experts"):
        get_peft_model(tiny_llama(), MoeLoraConfig(expert_r=2))


def test_target_parameters_name_one_projection_of_one_layer():
    config = MoeLoraConfig(moe_target=[], target_parameters=["layers.1.mlp.experts.down_proj"])
    [(name, layer)] = adapted(config).items()
    assert name.endswith("layers.1.mlp.experts")
    assert [n for n, _ in layer.lora_A["default"].named_parameters()] == ["down_proj"]


def projections(modules):
    """Layer number and adapted projections of every module of experts."""
    return {
        int(name.split("layers.")[1].split(".")[0]): {n for n, _ in module.lora_A["default"].named_parameters()}
        for name, module in modules.items()
        if isinstance(module, MoeLoraExperts)
    }


@pytest.mark.parametrize("moe_target", [["attention"], ["attention", "experts"]])
def test_target_parameters_choose_the_experts_exactly(moe_target):
    """They are more specific than the default of `moe_target`, and may differ from layer to layer."""
    names = ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]
    modules = adapted(MoeLoraConfig(moe_target=moe_target, target_parameters=names))
    assert projections(modules) == {0: {"gate_up_proj"}, 1: {"down_proj"}}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("experts", {0: {"gate_up_proj", "down_proj"}, 1: {"gate_up_proj", "down_proj"}}),
        ("layers.1.mlp.experts", {1: {"gate_up_proj", "down_proj"}}),
        ("down_proj", {0: {"down_proj"}, 1: {"down_proj"}}),
        ("gate_proj", {0: {"gate_up_proj"}, 1: {"gate_up_proj"}}),
        ("layers.1.mlp.experts.down_proj", {1: {"down_proj"}}),
    ],
)
def test_expert_words_in_target_modules_mean_what_they_say(word, expected):
    modules = adapted(MoeLoraConfig(moe_target=["attention"], target_modules=["q_proj", word]))
    assert projections(modules) == expected


def test_target_parameters_may_name_a_bare_parameter_beside_the_experts():
    config = MoeLoraConfig(moe_target=["experts"], target_parameters=["mlp.gate.weight"])
    assert last_words(adapted(config)) == {"experts", "gate"}


@pytest.mark.parametrize("model_type", ["gemma4_text", "qwen3_moe"])
def test_the_router_beside_a_regular_expression(model_type):
    """A router is a Linear in one family and a bare parameter in the other."""
    modules = adapted(MoeLoraConfig(moe_target=["router"], target_modules=r".*\.q_proj"), model_type)
    assert {"router" in n or "gate" in n for n in modules if not n.endswith("q_proj")} == {True}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "glm4_moe", "jetmoe"])
def test_all_linear_is_every_linear_but_head_routers_and_experts(model_type):
    model = build(model_type)
    anatomy = read_anatomy(model.named_modules())
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    wanted = [name for name in linears if "router" not in name and "gate." not in name]
    modules = adapted(MoeLoraConfig(target_modules="all-linear"), model_type)
    assert sorted(modules) == sorted([*wanted, *anatomy.experts])


def test_all_linear_leaves_the_tower_of_another_modality_alone():
    modules = adapted(MoeLoraConfig(target_modules="all-linear"), "llama4")
    assert modules
    assert not [name for name in modules if "vision" in name or "projector" in name]


def test_all_linear_among_other_words_is_an_error():
    with pytest.raises(ConfigError, match="no module to adapt is called 'all-linear'"):
        adapted(MoeLoraConfig(target_modules=["all-linear", "q_proj"]))


def test_experts_that_are_linears_have_the_words_and_the_rank_of_experts():
    modules = adapted(MoeLoraConfig(r=2, expert_r=5, expert_projections="down"), "switch_transformers")
    experts = {name: m for name, m in modules.items() if ".experts." in name}
    assert {name.rpartition(".")[2] for name in experts} == {"wo"}
    assert {m.r["default"] for m in experts.values()} == {5}
    assert {m.r["default"] for name, m in modules.items() if name not in experts} == {2}


def test_excluding_experts_excludes_all_of_them():
    for model_type in ("qwen3_moe", "jetmoe", "switch_transformers"):
        modules = adapted(MoeLoraConfig(exclude_modules=["experts"]), model_type)
        assert modules
        assert not [name for name, m in modules.items() if isinstance(m, MoeLoraExperts) or ".experts." in name]


def test_experts_of_another_modality_are_adapted_if_they_are_named():
    config = MoeLoraConfig(moe_target=[], target_modules=["vision_moe.experts"])
    assert {name.split(".", 3)[3] for name in adapted(config, "ernie4_5_vl_moe_text")} == {"vision_moe.experts"}


SELECTIONS = {
    "experts alone": {"moe_target": ["experts"]},
    "router": {"moe_target": ["experts", "router"]},
    "one projection by parameter": {"moe_target": [], "target_parameters": ["experts.down_proj"]},
    "a projection by a bare word": {"moe_target": ["attention"], "target_modules": ["q_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "every part": {"moe_target": ["experts", "attention", "shared_experts", "dense_mlp", "router"]},
    "everything but the experts": {"moe_target": ["attention", "dense_mlp"]},
    "a regular expression": {"target_modules": r".*\.q_proj"},
    "excluded": {"exclude_modules": r".*layers\.1\..*experts"},
}


@pytest.mark.parametrize("model_type", ["gemma4_text", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_a_loaded_adapter_adapts_what_the_saved_one_did(selection, model_type, tmp_path):
    model = get_peft_model(build(model_type), MoeLoraConfig(r=2, init_lora_weights=False, **selection))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(model_type), tmp_path)
    saved = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert saved.keys() == {name for name, _ in loaded.named_parameters() if "lora_" in name}
    for name, p in saved.items():
        assert torch.equal(loaded.get_parameter(name), p), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_porj"]}, "no module to adapt is called 'q_porj'; did you mean q_proj"),
        ({"target_parameters": ["experts.gate_up_porj"]}, "did you mean gate_up_proj"),
        ({"moe_target": ["shared_experts"]}, "nothing to adapt"),
        ({"layers_to_transform": [7]}, "nothing to adapt"),
        ({"target_modules": ["q_proj", "mlp"]}, "no module to adapt is called 'mlp'"),
        ({"target_modules": "q_proj"}, r"is a regular expression, and no Linear's .* give a list: \['q_proj'\]"),
        ({"target_modules": r".*typo"}, "is a regular expression"),
        ({"target_parameters": ["experts.down_proj"], "expert_projections": "gate_up"}, "Leave one of them out"),
    ],
)
def test_a_word_that_means_nothing_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        adapted(MoeLoraConfig(**options))


def test_pefts_guard_of_mamba_layers_holds():
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        adapted(MoeLoraConfig(target_modules=["out_proj"]), "nemotron_h")


@pytest.mark.parametrize("model_type", ["gemma4_text", "qwen3_moe", "switch_transformers", "vitpose_backbone", "doge"])
def test_a_second_adapter_finds_the_same_parts_as_the_first(model_type):
    """It sees the model as if no adapter were attached."""
    config = MoeLoraConfig(moe_target=["experts", "attention", "router"])
    model = get_peft_model(build(model_type), config)
    model.add_adapter("second", MoeLoraConfig(moe_target=["experts", "attention", "router"]))
    names = {
        a: {f"{n}.".replace(f".{a}.", ".") for n, _ in model.named_parameters() if f".{a}." in f"{n}."}
        for a in model.peft_config
    }
    assert names["default"] == names["second"]


def test_saving_a_whole_experts_module_is_refused():
    with pytest.raises(ConfigError, match="modules_to_save"):
        adapted(MoeLoraConfig(modules_to_save=["experts"]))


def test_a_dense_model_trains_ordinary_lora_and_says_so():
    with pytest.warns(UserWarning, match="LlamaForCausalLM has no routed experts: moe_lora trains ordinary LoRA"):
        model = get_peft_model(tiny_llama(), MoeLoraConfig())
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_experts_that_cannot_be_read_are_an_error_with_a_way_out():
    model = build("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.experts = WithScale()
    with pytest.raises(LayoutError, match=r"laid out in a way that is not known. Describe it in a plug-in"):
        get_peft_model(model, MoeLoraConfig())
    assert get_peft_model(model, MoeLoraConfig(moe_target=["attention"]))
