"""A profile is refused for every model but its own, with the difference named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeForCausalLM, Qwen3MoeModel

from tests.families import build, inputs
from tests.profiles.made import set_routers
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.census import tiny_config
from trl_moe_ext.profiles.fingerprint import is_same
from trl_moe_ext.profiles.match import check_profile
from trl_moe_ext.profiles.measure import measure_profile
from trl_moe_ext.profiles.profile import ExpertProfile

TOKENS = {"input_ids": torch.arange(5, 17).view(2, 6)}


def model_of(seed: int = 0, cls: type = Qwen3MoeForCausalLM, **overrides: object) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    return cls(tiny_config("qwen3_moe", **overrides))


@pytest.fixture(scope="module")
def profile() -> ExpertProfile:
    return measure_profile(model_of(), [TOKENS], name="mine")


def refusal(profile: ExpertProfile, model: torch.nn.Module) -> str:
    with pytest.raises(ConfigError) as caught:
        check_profile(profile, model)
    message = str(caught.value)
    assert message.startswith("the profile of mine is of another model: ")
    assert message.endswith("Make one of this model with `trl-moe profile`")
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_model_in_any_dtype(profile, dtype):
    check_profile(profile, model_of().to(dtype))


def test_a_profile_in_bfloat16_for_a_model_in_float32():
    check_profile(measure_profile(model_of().bfloat16(), [TOKENS]), model_of())


@pytest.mark.parametrize(
    "config",
    [
        MoeLoraConfig(r=2),
        MoeLoraConfig(r=2, router_mode="lora"),
        MoeLoraConfig(r=2, router_mode="full"),
        MoeLoraConfig(r=2, router_bias=True),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    ],
    ids=["moe_lora", "lora on routers", "copies of routers", "biases", "lora"],
)
def test_adapters_are_looked_through(profile, config):
    adapted = get_peft_model(model_of(), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    check_profile(profile, adapted)
    check_profile(replace(measure_profile(adapted, [TOKENS]), model="mine"), model_of())


def test_another_checkpoint(profile):
    assert "the weights of the router of layer 0 (model.layers.0.mlp.experts) differ" in refusal(profile, model_of(1))


def test_one_layer_of_another_checkpoint(profile):
    model = model_of()
    set_routers(model.model.layers[1], 1.02)
    assert "router of layer 1 (model.layers.1.mlp.experts) differ; it is another checkpoint" in refusal(profile, model)


@pytest.mark.parametrize("weights", ["meta", "none in the profile"])
def test_without_weights_on_one_side_the_rest_is_compared(profile, weights):
    if weights == "meta":
        with torch.device("meta"):
            other = Qwen3MoeForCausalLM(tiny_config("qwen3_moe"))
    else:
        profile = replace(profile, layers=tuple(replace(layer, fingerprint=()) for layer in profile.layers))
        other = model_of(1)
    check_profile(profile, other)
    fewer = replace(profile, layers=(replace(profile.layers[0], top_k=3), *profile.layers[1:]))
    assert "layer 0 (model.layers.0.mlp.experts) sends a token to 3 experts in it instead of 2" in refusal(
        fewer, other
    )


def test_another_number_of_experts(profile):
    message = refusal(profile, model_of(num_experts=4, num_local_experts=4))
    assert "layer 0 (model.layers.0.mlp.experts) has 8 experts in it instead of 4" in message


def test_another_top_k(profile):
    assert "sends a token to 2 experts in it instead of 1" in refusal(profile, model_of(num_experts_per_tok=1))


def test_more_and_fewer_layers(profile):
    shallow = refusal(profile, model_of(num_hidden_layers=1))
    assert "it has the experts 'model.layers.1.mlp.experts', which this Qwen3MoeForCausalLM has not" in shallow
    deep = refusal(profile, model_of(num_hidden_layers=4))
    assert "it has not the experts 'model.layers.2.mlp.experts' of this Qwen3MoeForCausalLM" in deep
    assert "and 1 more such differences" in deep


def test_another_family(profile):
    message = refusal(profile, build("dbrx"))
    assert "which this DbrxForCausalLM has not" in message


def test_a_dense_model(profile):
    message = refusal(profile, torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert "it has the experts 'model.layers.0.mlp.experts', which this Sequential has not" in message


def test_the_same_model_by_another_auto_class(profile):
    message = refusal(profile, model_of(cls=Qwen3MoeModel))
    assert "its names begin with 'model.' (it was loaded as Qwen3MoeForCausalLM)" in message
    assert "those of this model with '' (Qwen3MoeModel). Load both with the same class" in message


@pytest.mark.parametrize(
    "model_type", ["deepseek_v4", "ernie4_5_vl_moe_text", "doge", "jetmoe", "longcat_flash", "zaya"]
)
def test_odd_families_match_themselves_and_no_other_checkpoint(model_type):
    model = build(model_type)
    profile = replace(measure_profile(model, [inputs(model_type)]), model="mine")
    check_profile(profile, model)
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    assert "it is another checkpoint" in refusal(profile, model)


def test_fingerprints_up_to_rounding():
    numbers = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 1000)
    exact = numbers.tolist()
    assert is_same(exact, numbers.bfloat16().tolist())
    assert is_same(exact, numbers.half().tolist())
    assert not is_same(exact, (numbers * 1.01).tolist())
