"""Options of MOE_ESFT: what they do, and what is refused before anything is trained."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from tests.families import build, inputs
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts import census
from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.profiles.measure import measure_profile
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig, MoeEsftExperts, MoeEsftLinear

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def adapted(model_type="qwen3_moe", **options):
    return get_peft_model(build(model_type), MoeEsftConfig(**options))


def experts_layers(model):
    return [module for module in model.modules() if isinstance(module, MoeEsftExperts)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expert_selection is not given: say profile:<file>"),
        ({"expert_selection": "some"}, "expert_selection='some' is unknown"),
        ({"expert_selection": "all", "moe_target": ["expert"]}, "did you mean experts"),
        ({"expert_selection": "all", "moe_target": []}, "nothing would be trained"),
        ({"expert_selection": "profile:p.json", "moe_target": ["attention"]}, "expert_selection has no effect"),
        ({"expert_selection": "profile:p.json"}, "does not say how many experts"),
        ({"expert_selection": "all", "experts_per_layer": 2}, "no effect without a profile"),
        ({"expert_selection": "all", "layers_pattern": "layers"}, "no effect without layers_to_transform"),
        ({"expert_selection": "all", "target_modules": "q.*", "layers_to_transform": [0]}, "layers_to_transform has"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MoeEsftConfig(**options)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("qwen3_moe", {"moe_target": ["router"]}, r"mlp\.gate\.weight'.* modules_to_save=.*mlp\.gate'"),
        ("qwen3_moe", {"moe_target": [], "target_modules": ["embed_tokens"]}, "are Embedding"),
        ("doge", {"expert_selection": "all"}, "are Embedding, and moe_esft trains Linears"),
        ("qwen3_moe", {"moe_target": [], "target_modules": ["down_proj"]}, "names routed experts, and expert_selec"),
        ("qwen3_moe", {"selected_experts": {LAYERS[0]: [8]}}, "expert 8 of"),
    ],
)
def test_what_a_model_cannot_have_trained_is_refused(model_type, options, message):
    model = build(model_type)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, MoeEsftConfig(**options))
    assert [type(module) for module in model.modules()] == classes


def test_all_trains_every_expert_and_saves_no_indices():
    model = adapted(expert_selection="all")
    assert all(layer.esft_delta["default"].down_proj.shape[0] == 8 for layer in experts_layers(model))
    assert not any("esft_selected" in name for name in model.state_dict())


def test_a_profile_chooses_the_experts(tmp_path):
    stock = build("qwen3_moe")
    measure_profile(stock, [inputs("qwen3_moe")], name="tiny", dataset="random tokens").save(tmp_path / "p.json")
    model = get_peft_model(
        stock, MoeEsftConfig(expert_selection=f"profile:{tmp_path / 'p.json'}", experts_per_layer=2)
    )
    selected = model.peft_config["default"].selected_experts
    assert selected.keys() == {*LAYERS}
    for name, layer in zip(LAYERS, experts_layers(model), strict=True):
        assert [*layer.selections["default"].experts] == selected[name]
        assert layer.esft_delta["default"].gate_up_proj.shape[0] == 2


def test_parts_beside_the_experts_are_trained_in_full():
    model = adapted("qwen2_moe", moe_target=["attention", "shared_experts"])
    names = {name for name, module in model.named_modules() if isinstance(module, MoeEsftLinear)}
    assert not experts_layers(model)
    assert {name.split(".")[-2] for name in names} == {"self_attn", "shared_expert"}
    # Qwen2's attention has biases.
    assert any(name.endswith("q_proj.esft_delta.default.bias") for name, _ in model.named_parameters())


def test_single_layers():
    model = adapted(expert_selection="all", layers_to_transform=[1])
    assert [name for name, m in model.named_modules() if isinstance(m, MoeEsftExperts)] == [
        f"base_model.model.{LAYERS[1]}"
    ]


def test_only_linears_of_chosen_experts_are_adapted():
    """Experts that are modules of their own need no indices: their names say which they are."""
    stock = build("switch_transformers")
    containers = sorted({*read_anatomy(stock.named_modules()).expert_linears.values()})
    model = get_peft_model(stock, MoeEsftConfig(selected_experts={name: [1] for name in containers}))
    adapted_linears = [name for name, m in model.named_modules() if isinstance(m, MoeEsftLinear)]
    assert len(adapted_linears) == 2 * len(containers)
    assert all(".expert_1." in name for name in adapted_linears)


def test_deltas_are_float32_beside_bfloat16_weights():
    model = get_peft_model(
        census.build("gpt_oss", torch.bfloat16), MoeEsftConfig(expert_selection="all", moe_target=["experts"])
    )
    assert {p.dtype for n, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert names == {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}


def test_a_dense_model_trains_its_mlps_with_a_warning():
    tiny = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    with pytest.warns(UserWarning, match="no routed experts: moe_esft trains the Linears of its MLPs"):
        model = get_peft_model(LlamaForCausalLM(tiny), MoeEsftConfig(expert_selection="all"))
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, MoeEsftLinear)}
    assert names == {"gate_proj", "up_proj", "down_proj"}
