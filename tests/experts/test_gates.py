"""An activation is recognised by what it computes."""

from __future__ import annotations

import pytest

from tests.experts.stacked import OwnGate, StackedExperts, Ungated
from tests.families import build, experts_of
from trl_moe_ext.experts.gates import recognise_gate
from trl_moe_ext.experts.reading import read_layout


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "silu_glu"),
        ("gemma4_text", "gelu_tanh_glu"),
        ("gpt_oss", "clamped"),
        ("nemotron_h", "relu_squared"),
        ("step3p5", "silu_glu"),
        ("deepseek_v4", None),
    ],
)
def test_families(model_type, name):
    experts = experts_of(build(model_type))
    gate = recognise_gate(experts, read_layout(experts))
    assert (gate and gate.name) == name


def test_the_numbers_of_a_clamped_gate_are_the_modules():
    experts = experts_of(build("gpt_oss"))
    gate = recognise_gate(experts, read_layout(experts))
    assert (gate.alpha, gate.limit) == (experts.alpha, experts.limit)


@pytest.mark.parametrize(("experts", "name"), [(StackedExperts, "silu_glu"), (Ungated, "silu"), (OwnGate, None)])
def test_modules(experts, name):
    module = experts()
    gate = recognise_gate(module, read_layout(module))
    assert (gate and gate.name) == name
