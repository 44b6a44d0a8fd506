"""Shapes small enough for tests, and measurements without child processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_moe_ext.bench import process
from trl_moe_ext.bench.plan import Plan
from trl_moe_ext.bench.process import Missing
from trl_moe_ext.bench.shapes import SHAPES, Shape

_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY = {
    "tiny-qwen3": Shape(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"hidden_size": 64, "moe_intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 2, **_ATTENTION},
    ),
    # Transposed, biased and clamped.
    "tiny-gpt-oss": Shape(
        GptOssForCausalLM,
        GptOssConfig,
        {"hidden_size": 64, "intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 2, **_ATTENTION},
    ),
    # Outside the experts interface; only its block can be called.
    "tiny-llama4": Shape(
        Llama4ForCausalLM,
        Llama4TextConfig,
        {
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            **_ATTENTION,
        },
    ),
}


def add_tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny shapes known, for one test."""
    for name, shape in TINY.items():
        monkeypatch.setitem(SHAPES, name, shape)


def stay_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a child process would do, for one test."""

    def run(task: str, plan: Plan) -> dict[str, Any] | Missing:
        answer = process.perform(task, plan)
        return Missing(answer["unavailable"]) if "unavailable" in answer else answer

    monkeypatch.setattr(process, "_run", run)


def plan(**changes: Any) -> Plan:
    """A plan of one quick step in float32."""
    return replace(Plan("experts", "tiny-qwen3", "moe_lora", 16, "float32", 4, 1, "cpu"), **changes)
