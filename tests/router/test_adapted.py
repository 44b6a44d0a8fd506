"""Routers are traced through whatever an adapter puts in their place, and through its absence."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.families import FAMILIES, build, inputs, randomise_factors
from tests.router.routed import FORMS, TYPES, observed
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.router.routers import find_routers, routers_left_out
from trl_moe_ext.router.trace import RouterTrace, Routing


def routings_of(model: nn.Module, model_type: str) -> list[Routing]:
    seen: list[Routing] = []
    torch.manual_seed(0)
    with torch.no_grad(), RouterTrace(find_routers(model), seen.append):
        model(**inputs(model_type))
    return seen


def check_same(found: list[Routing], expected: list[Routing]) -> None:
    assert [routing.router.name for routing in found] == [routing.router.name for routing in expected]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours.top_k_index, theirs.top_k_index)


def described(model: nn.Module) -> list[tuple[object, ...]]:
    return [(r.name, r.num_experts, r.top_k, r.experts, r.label, r.logits_at) for r in find_routers(model)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_adapted_experts_and_routers_are_traced(model_type):
    model = build(model_type)
    names, left_out = described(model), routers_left_out(model)
    words = ["experts", "router"] if names else ["experts"]
    model = get_peft_model(model, MoeLoraConfig(r=2, moe_target=words)).eval()
    assert described(model) == names
    assert routers_left_out(model) == left_out
    plain = observed(model_type).routings
    check_same(routings_of(model, model_type), plain)
    randomise_factors(model)
    changed = routings_of(model, model_type)
    assert [routing.router.name for routing in changed] == [routing.router.name for routing in plain]
    # The first router sees the tokens that it saw before: what differs is the adapter on it.
    assert not plain or not torch.allclose(changed[0].logits, plain[0].logits, atol=1e-3)
    with model.disable_adapter():
        check_same(routings_of(model, model_type), plain)
    assert described(model.unload()) == names


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*TYPES} - {*FAMILIES}))
def test_adapted_experts_and_routers_of_a_composite_are_traced(model_type):
    test_adapted_experts_and_routers_are_traced(model_type)


# Doge's router cannot be copied without its experts.
@pytest.mark.parametrize("model_type", sorted(FORMS.keys() - {"doge"}))
def test_routers_that_are_trained_in_full_are_traced(model_type):
    plain = observed(model_type).routings
    name = plain[0].router.name.rpartition(".")[2]
    config = MoeLoraConfig(r=2, moe_target=["experts"], modules_to_save=[name])
    model = get_peft_model(build(model_type), config).eval()
    routers = find_routers(model)
    seen: list[Routing] = []
    with torch.no_grad(), RouterTrace(routers, seen.append):
        model(**inputs(model_type))
        check_same(seen, plain)
        for router in routers:
            for weight in router.own.parameters():
                weight.add_(torch.randn_like(weight))
        seen.clear()
        model(**inputs(model_type))
        assert not torch.allclose(seen[0].logits, plain[0].logits, atol=1e-3)
        # The same hooks see the original when the adapter is off: that is what drift is measured against.
        seen.clear()
        with model.disable_adapter():
            model(**inputs(model_type))
        check_same(seen, plain)


def test_own_is_the_module_that_runs_inside_the_wrappers():
    model = build("qwen3_moe")
    gates = [router.module for router in find_routers(model)]
    adapted = get_peft_model(model, MoeLoraConfig(r=2, moe_target=["attention"], modules_to_save=["gate"]))
    routers = find_routers(adapted)
    assert all(router.own is not gate for router, gate in zip(routers, gates, strict=True))
    assert all(router.own.weight.requires_grad for router in routers)
    with adapted.disable_adapter():
        assert [router.own for router in routers] == gates
    lora = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=2, moe_target=["router"]))
    assert [type(router.own).__name__ for router in find_routers(lora)] == ["Qwen3MoeTopKRouter"] * 2
