"""Every module of routed experts of every family has its router, or a reason why it has none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from tests.router.routed import TYPES, observed
from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts import census
from trl_moe_ext.router.labels import short_labels
from trl_moe_ext.router.routers import BY_CALLER, BY_TOKEN_ID, find_routers, routers_left_out

# Every family some of whose experts have no router of their own.
LEFT_OUT = {"deepseek_v4": {BY_TOKEN_ID}, "vitpose": {BY_CALLER}, "vitpose_backbone": {BY_CALLER}}


@pytest.mark.parametrize("model_type", TYPES)
def test_every_block_of_experts_has_one_router_or_a_reason(model_type):
    seen = observed(model_type)
    block_of = {router.name: router.name.rpartition(".")[0] for router in seen.routers}
    if model_type == "doge":  # the block is the router
        block_of = {router.name: router.name for router in seen.routers}
    reasons = {name.rpartition(".")[0] for name in seen.left_out}
    assert sorted([*block_of.values(), *reasons]) == sorted(seen.blocks)
    assert {*seen.left_out.values()} == LEFT_OUT.get(model_type, set())
    assert len({router.label for router in seen.routers}) == len(seen.routers)
    for router in seen.routers:
        assert router.experts == router.name or router.experts.startswith(f"{block_of[router.name]}.")


@pytest.mark.parametrize("model_type", TYPES)
def test_experts_and_top_k_are_those_of_the_routing(model_type):
    for routing in observed(model_type).routings:
        E, K = routing.router.num_experts, routing.router.top_k
        tokens = len(routing.logits)
        assert routing.logits.shape == (tokens, E)
        assert routing.top_k_index.shape == (tokens, K)
        assert routing.top_k_index.dtype == torch.int64
        assert int(routing.top_k_index.min()) >= 0
        assert int(routing.top_k_index.max()) < E
        assert all(len(set(row)) == K for row in routing.top_k_index.tolist()), "an expert was chosen twice"


# Tiny models have 8 experts, of which two are chosen for a token; these have others.
SIZES = {
    "dbrx": (8, 1),
    "dots3_note_vision_encoder": (4, 2),
    "doge": (64, 2),  # product keys: 8 times 8
    "hunyuan_v1_moe": (8, 1),
    "llama4": (8, 1),
    "llama4_text": (8, 1),
    "longcat_flash": (10, 2),  # two of them identity experts
    "switch_transformers": (8, 1),
    "zaya": (9, 1),  # the last stands for no expert
}


@pytest.mark.parametrize("model_type", TYPES)
def test_sizes(model_type):
    if LEFT_OUT.get(model_type) != {BY_CALLER}:
        first = observed(model_type).routers[0]
        assert (first.num_experts, first.top_k) == SIZES.get(model_type, (8, 2))


def test_a_model_of_parts_without_a_forward_has_the_routers_of_all_its_parts():
    routers = find_routers(census.skeleton("qwen3_omni_moe"))
    assert [router.label for router in routers] == ["thinker.0", "thinker.1", "talker.0", "talker.1"]


def test_a_dense_model_has_no_routers():
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    assert find_routers(LlamaForCausalLM(config)) == []
    assert routers_left_out(LlamaForCausalLM(config)) == {}


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1
    )
    config.num_key_value_heads = 1
    return MixtralForCausalLM(config)


def test_experts_without_a_router_are_an_error_that_names_them():
    model = mixtral()
    model.model.layers[1].mlp.gate = nn.Identity()
    with pytest.raises(LayoutError, match=r"beside the experts 'model.layers.1.mlp.experts'; found none"):
        find_routers(model)


def test_experts_with_two_routers_are_an_error_that_names_them():
    model = mixtral()
    model.model.layers[0].mlp.router = type(model.model.layers[0].mlp.gate)(model.config)
    with pytest.raises(LayoutError, match=r"mlp.gate \(MixtralTopKRouter\), model.layers.0.mlp.router"):
        find_routers(model)


def test_a_declared_router_without_experts_is_an_error_that_names_it():
    model = mixtral()
    model.model.layers[0].mlp.experts = nn.Identity()
    with pytest.raises(LayoutError, match=r"router logits of 'model.layers.0.mlp.gate', but no routed experts"):
        find_routers(model)


def test_a_router_that_does_not_tell_top_k_is_an_error_that_names_it():
    model = mixtral()
    del model.model.layers[0].mlp.gate.top_k
    model.model.layers[0].mlp.__dict__.pop("top_k", None)
    del model.config.num_experts_per_tok
    with pytest.raises(LayoutError, match=r"how many experts 'model.layers.0.mlp.gate' .* picks"):
        find_routers(model)


LABELS = {
    "one stack": {"model.layers.3.mlp.gate": "3", "model.layers.12.mlp.gate": "12"},
    "two stacks": {
        "encoder.block.1.layer.1.mlp.router": "encoder.1",
        "decoder.block.1.layer.2.mlp.router": "decoder.1",
    },
    "two in a layer": {"layers.0.mlp.router": "0.mlp", "layers.0.attention.experts.router": "0.attention"},
    "two in some layers": {"layers.0.a.gate": "0.a", "layers.0.b.gate": "0.b", "layers.1.a.gate": "1"},
    "stacks that no single part tells apart": {
        "a.x.layers.0.gate": "a.x.layers.0",
        "a.y.layers.0.gate": "a.y.layers.0",
        "b.y.layers.0.gate": "b.y.layers.0",
    },
    "one stack inside another": {"layers.0.gate": "layers.0", "layers.mtp.0.gate": "layers.mtp.0"},
    "no number": {"mlp.gate": "mlp.gate"},
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_short_and_unique(case):
    assert short_labels(list(LABELS[case])) == LABELS[case]
