"""Every named shape is a layer of its family in its real sizes."""

from __future__ import annotations

import pytest
import torch

from tests.bench.tiny import TINY
from trl_moe_ext.bench.fit import sizes_of
from trl_moe_ext.bench.plan import Request
from trl_moe_ext.bench.shapes import SHAPES, shape_named
from trl_moe_ext.errors import ConfigError

# E, H, I, top-k as the model cards have them, and the GB of the layer's experts in bfloat16.
SIZES = {
    "qwen3-30b-a3b": ("E=128 H=2048 I=768 top-8", 1.21),
    "gemma4-26b-a4b": ("E=128 H=2816 I=704 top-8", 1.52),
    "gpt-oss-20b": ("E=32 H=2880 I=2880 top-4", 1.59),
    "mixtral-8x7b": ("E=8 H=4096 I=14336 top-2", 2.82),
    "olmoe": ("E=64 H=2048 I=1024 top-8", 0.81),
    "deepseek-v2-lite": ("E=64 H=2048 I=1408 top-6", 1.11),
    "llama4-scout": ("E=16 H=5120 I=8192 top-1", 4.03),
    "llama4-maverick": ("E=128 H=5120 I=8192 top-1", 32.21),
    "llama4-small": ("E=16 H=1024 I=2048 top-1", 0.20),
}


def request_of(shape: str, kind: str) -> Request:
    return Request(kind, shape, ("frozen",), (16,), "bfloat16", 16, 1, 1, "cpu")


def test_no_shape_is_left_out() -> None:
    assert SIZES.keys() | TINY.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    alone, layer = sizes_of(request_of(name, "experts")), sizes_of(request_of(name, "layer"))
    description, gigabytes = SIZES[name]
    assert alone.description == layer.description == description
    assert layer.expert_parameters * 2 / 1e9 == pytest.approx(gigabytes, abs=0.01)
    # The layer has attention, router, embedding and head besides.
    assert alone.expert_parameters == layer.expert_parameters < layer.parameters
    assert layer.weight_bytes == 2 * layer.parameters
    assert alone.is_dense == name.startswith("llama4")


def test_the_experts_alone_are_the_experts_alone() -> None:
    sizes = sizes_of(request_of("qwen3-30b-a3b", "experts"))
    assert sizes.parameters == sizes.expert_parameters


def test_weights_are_the_same_in_every_process_and_finite() -> None:
    first, second = (shape_named("tiny-gpt-oss").build(torch.float32, "cpu").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)


def test_an_unknown_shape() -> None:
    with pytest.raises(ConfigError, match=r"there is no shape 'qwen3-30b'; did you mean qwen3-30b-a3b\?"):
        shape_named("qwen3-30b")
