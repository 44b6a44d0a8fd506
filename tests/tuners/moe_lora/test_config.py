"""Options: what they do, and what is refused before anything is trained."""

from __future__ import annotations

import pytest
from peft import EvaConfig, PeftConfig, PeftType, get_peft_model
from torch import nn

from tests.families import build
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError, PluginError
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts


def experts_of(model):
    return [m for m in model.modules() if isinstance(m, MoeLoraExperts)]


REFUSED = {
    "use_dora": True,
    "lora_bias": True,
    "fan_in_fan_out": True,
    "bias": "all",
    "layer_replication": [(0, 1), (0, 1)],
    "use_qalora": True,
    "alora_invocation_tokens": [1],
    "megatron_config": {"tp": 1},
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_without_a_meaning_on_experts_are_refused_by_name(option):
    with pytest.raises(ConfigError, match=option):
        MoeLoraConfig(**{option: REFUSED[option]})


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_4", "olora", "eva", "loftq", "corda", "orthogonal", "mica"])
def test_initialisations_from_a_weight_are_refused(method):
    eva = {"eva_config": EvaConfig()} if method == "eva" else {}
    with pytest.raises(ConfigError, match=r"init_lora_weights.*use True"):
        MoeLoraConfig(init_lora_weights=method, **eva)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0 is not a rank"),
        ({"expert_r": 0}, "expert_r=0 is not a rank"),
        ({"expert_r": 2.5}, "expert_r=2.5 is not a rank"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"moe_target": ["expert"]}, "did you mean experts"),
        ({"expert_projections": "gate"}, "did you mean gate_up"),
        ({"moe_target": []}, "nothing would be trained"),
        ({"moe_target": ["attention"], "expert_r": 4}, "expert_r has no effect"),
        ({"moe_target": ["attention"], "expert_alpha": 4}, "expert_alpha has no effect"),
        ({"save_activations": "gateup"}, "save_activations: 'gateup' is unknown.*gate_up"),
    ],
)
def test_values_out_of_range_and_options_without_effect_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(**options)


def test_an_unknown_kernel_is_answered_with_the_known_ones():
    with pytest.raises(PluginError, match="did you mean grouped"):
        get_peft_model(build("qwen3_moe"), MoeLoraConfig(kernel="groupd"))


def test_a_kernel_that_always_saves_is_refused_where_nothing_is_to_be_saved():
    with pytest.raises(ConfigError, match=r"'none' has no effect with kernel 'grouped'.*use kernel 'fused'"):
        get_peft_model(build("qwen3_moe"), MoeLoraConfig(kernel="grouped", save_activations="none"))


def test_how_a_machine_computes_is_not_saved(tmp_path):
    MoeLoraConfig(kernel="reference", save_activations="none").save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert (loaded.kernel, loaded.save_activations) == (MoeLoraConfig().kernel, MoeLoraConfig().save_activations)


def test_the_config_survives_saving(tmp_path):
    config = MoeLoraConfig(r=4, expert_r=2, expert_alpha=3.0, expert_projections="down", moe_target=["experts"])
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoeLoraConfig)
    assert loaded.peft_type == PeftType.MOE_LORA
    assert (loaded.expert_r, loaded.expert_alpha, loaded.expert_projections) == (2, 3.0, "down")


def test_experts_have_their_own_rank_and_alpha():
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=8, lora_alpha=16, expert_r=2, expert_alpha=6))
    layer = experts_of(model)[0]
    assert layer.lora_A["default"].gate_up_proj.shape == (8, 2, 64)
    assert layer.lora_B["default"].gate_up_proj.shape == (8, 64, 2)
    assert layer.scaling["default"] == 3.0
    attention = model.base_model.model.model.layers[0].self_attn.q_proj
    assert attention.r["default"] == 8
    assert attention.scaling["default"] == 2.0


def test_rank_stabilised_scaling():
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=4, lora_alpha=8, use_rslora=True))
    assert experts_of(model)[0].scaling["default"] == 4.0


def test_rank_pattern_reaches_the_experts():
    config = MoeLoraConfig(r=4, rank_pattern={"layers.1.mlp.experts": 2}, alpha_pattern={"layers.1.mlp.experts": 6})
    layers = experts_of(get_peft_model(build("qwen3_moe"), config))
    assert [layer.r["default"] for layer in layers] == [4, 2]
    assert layers[1].scaling["default"] == 3.0


@pytest.mark.parametrize(("word", "names"), [("gate_up", {"gate_up_proj"}), ("down", {"down_proj"})])
def test_one_projection_alone(word, names):
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(expert_projections=word))
    assert {n for n, _ in experts_of(model)[0].lora_A["default"].named_parameters()} == names


@pytest.mark.parametrize("initialisation", [True, "gaussian", False])
def test_initialisation(initialisation):
    layer = experts_of(get_peft_model(build("qwen3_moe"), MoeLoraConfig(init_lora_weights=initialisation)))[0]
    A, B = layer.lora_A["default"].gate_up_proj, layer.lora_B["default"].gate_up_proj
    assert (B.abs().max() == 0) == (initialisation is not False)
    if initialisation == "gaussian":
        assert abs(A.std() * layer.r["default"] - 1) < 0.05
    else:
        assert abs(A.abs().max() - 64**-0.5) < 1e-3  # the bound of nn.Linear, for each expert's own fan-in


def test_dropout_is_active_in_training_only():
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(lora_dropout=0.5))
    layer = experts_of(model)[0]
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert layer.train()._dropout("default") == 0.5
    assert layer.eval()._dropout("default") == 0.0
