"""What is read from a module of experts, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.families import build, experts_of
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts.layout import expert_weights
from trl_moe_ext.experts.reading import read_layout


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("qwen3_moe", {"has_gate": True, "is_interleaved": False}),
        ("gpt_oss", {"has_gate": True, "is_interleaved": True}),
        ("aria_text", {"has_gate": True, "is_interleaved": False}),
        ("nemotron_h", {"has_gate": False, "is_interleaved": False}),
    ],
)
def test_flags(model_type, expected):
    layout = read_layout(experts_of(build(model_type)))
    assert {name: getattr(layout, name) for name in expected} == expected
    assert all(p.is_transposed is (model_type in ("gpt_oss", "aria_text")) for p in layout.projections)
    assert layout.up.name == ("gate_up_proj" if expected["has_gate"] else "up_proj")


def test_a_norm_after_each_expert():
    assert read_layout(experts_of(build("muse_spark_text"))).has_post_norm


def test_sizes_do_not_depend_on_the_orientation():
    layout = read_layout(experts_of(build("gpt_oss")))
    assert (layout.num_experts, layout.up.in_features, layout.up.out_features) == (8, 64, 192)
    assert (layout.down.in_features, layout.down.out_features) == (96, 64)
    assert (layout.up.bias, layout.down.bias) == ("gate_up_proj_bias", "down_proj_bias")


def test_weights_are_views():
    experts = experts_of(build("qwen3_moe"))
    weights = expert_weights(experts, read_layout(experts))
    assert weights.up.shape == (8, 64, 64)
    assert weights.up.data_ptr() == experts.gate_up_proj.data_ptr()
    assert weights.down.data_ptr() == experts.down_proj.data_ptr()


def test_the_number_of_experts_is_the_parameters_not_the_configs():
    experts = experts_of(build("qwen3_moe"))
    experts.num_experts = 99
    assert read_layout(experts).num_experts == 8


def test_other_modules_are_not_experts():
    assert read_layout(nn.Linear(2, 2)) is None
    assert read_layout(build("qwen3_moe")) is None


def test_quantised_experts_are_refused_by_name_if_they_are_wanted():
    model = build("qwen3_moe")
    for layer in model.model.layers:
        layer.mlp.experts.down_proj = nn.Parameter(layer.mlp.experts.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(LayoutError, match=r"Qwen3MoeExperts.down_proj is stored as torch.int8: quantised"):
        get_peft_model(model, MoeLoraConfig())
    assert get_peft_model(model, MoeLoraConfig(moe_target=["attention"]))


def test_stacks_that_do_not_fit_together_are_refused():
    experts = experts_of(build("qwen3_moe"))
    experts.down_proj = nn.Parameter(experts.down_proj[:7])
    with pytest.raises(LayoutError, match=r"gate_up_proj \(8, 64, 64\) and down_proj \(7, 64, 32\)"):
        read_layout(experts)
