"""Each forward is seen once, with a graph for a loss, under checkpointing too; what cannot be read is an error."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from tests.families import build, inputs
from tests.router.routed import FORMS, NOT_REACHED, TYPES, run
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts import census
from trl_moe_ext.router import trace as trace_module
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.trace import RouterTrace, Routing


def checkpointed(model_type: str, use_reentrant: bool) -> nn.Module:
    model = build(model_type).train()
    if not model.supports_gradient_checkpointing:
        pytest.skip("the family has no gradient checkpointing")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", FORMS)
def test_a_recomputation_is_not_seen(model_type, use_reentrant):
    model = checkpointed(model_type, use_reentrant)
    seen: list[Routing] = []
    forwards: list[nn.Module] = []
    routers = find_routers(model)
    for router in routers:
        router.module.register_forward_hook(lambda module, args, output: forwards.append(module))
    # A reentrant checkpoint wants gradients of its input, which are embeddings or pixels for some types.
    arguments = {name: x.requires_grad_(x.is_floating_point()) for name, x in inputs(model_type).items()}
    with RouterTrace(routers, seen.append):
        census.output(model, arguments).float().square().mean().backward()
    missing = NOT_REACHED.get(model_type, "\0")
    expected = [router.name for router in routers if missing not in router.name]
    assert sorted(routing.router.name for routing in seen) == sorted(expected)
    assert len(forwards) == 2 * len(expected), "nothing was computed again: nothing was tested"
    assert all(routing.logits.requires_grad is not use_reentrant for routing in seen)


# Families whose own checkpoints fail, and those without routers.
NOT_CHECKPOINTED = {
    "diffusion_gemma",  # its decoder reads the cache that its encoder's checkpoints fill
    "diffusion_gemma_text",  # refuses to be checkpointed
    "vitpose",
    "vitpose_backbone",
}


@pytest.mark.slow
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", sorted({*TYPES} - {*FORMS} - NOT_CHECKPOINTED))
def test_a_recomputation_is_not_seen_of_any_family(model_type, use_reentrant):
    test_a_recomputation_is_not_seen(model_type, use_reentrant)


def gradients_of_router_losses(model: nn.Module, model_type: str) -> list[Tensor | None]:
    """Of all weights, from a loss that the observer adds up while the model runs."""
    losses: list[Tensor] = []

    def observe(routing: Routing) -> None:
        losses.append(routing.probabilities.square().sum() + routing.logits.float().logsumexp(-1).square().mean())

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    torch.manual_seed(0)
    with RouterTrace(find_routers(model), observe):
        out = census.output(model, inputs(model_type))
    loss = out.float().square().mean() + torch.stack(losses).sum()
    return list(torch.autograd.grad(loss, weights, allow_unused=True))


@pytest.mark.parametrize("model_type", FORMS)
def test_losses_that_the_observer_computes_have_the_same_gradients_under_checkpointing(model_type):
    found = gradients_of_router_losses(checkpointed(model_type, use_reentrant=False), model_type)
    expected = gradients_of_router_losses(build(model_type).train(), model_type)
    assert sum(gradient is not None for gradient in expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_a_checkpoint_saves_for_the_observer_would_break_it(monkeypatch):
    monkeypatch.setattr(trace_module, "_outside_checkpoint", contextlib.nullcontext)
    with pytest.raises(CheckpointError, match="different number of tensors"):
        gradients_of_router_losses(checkpointed("qwen3_moe", use_reentrant=False), "qwen3_moe")


@pytest.mark.parametrize("model_type", FORMS)
def test_gradients_flow_through_logits_and_probabilities(model_type):
    model = build(model_type).train()
    seen: list[Routing] = []
    with RouterTrace(find_routers(model), seen.append):
        model(**inputs(model_type))
    for routing in seen:
        weights = [p for p in routing.router.own.parameters() if p.requires_grad]
        direction = torch.randn(routing.probabilities.shape)
        for loss in (routing.logits.square().sum(), (routing.probabilities * direction).sum()):
            found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
            assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in found)


def test_the_mask_is_flattened_and_ignored_by_routers_of_other_tokens():
    model = build("qwen3_moe")
    seen: list[Routing] = []
    mask = torch.arange(12).expand(2, 12) < torch.tensor([[12], [7]])
    with torch.no_grad(), RouterTrace(find_routers(model), seen.append) as trace:
        for kept in (mask, mask.flatten(), mask.long(), mask[:1], None):
            trace.kept = kept
            model(**inputs("qwen3_moe"))
    given, flat, integers, other, none = (seen[i].kept for i in range(0, 10, 2))
    for kept in (given, flat, integers):
        assert kept.dtype == torch.bool
        assert torch.equal(kept, torch.tensor([True] * 12 + [True] * 7 + [False] * 5))
    assert other is None
    assert none is None


def test_attaching_twice_and_removing_twice_is_attaching_and_removing_once():
    model = build("dbrx")
    seen: list[Routing] = []
    trace = RouterTrace(find_routers(model), seen.append)
    model(**inputs("dbrx"))
    assert not seen
    trace.attach().attach()
    with trace.paused(), trace.paused():
        model(**inputs("dbrx"))
    assert not seen
    model(**inputs("dbrx"))
    assert len(seen) == 2
    trace.remove()
    trace.remove()
    model(**inputs("dbrx"))
    assert len(seen) == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with trace:
        model(**inputs("dbrx"))
    assert len(seen) == 4


def run_with_images(model_type: str) -> list[Routing]:
    model = build(model_type)
    seen: list[Routing] = []
    tokens = inputs(model_type)["input_ids"]
    is_image = torch.zeros_like(tokens).index_fill_(1, torch.arange(3, 7), 1)
    with torch.no_grad(), RouterTrace(find_routers(model), seen.append) as trace:
        trace.kept = torch.ones_like(tokens, dtype=torch.bool)
        model(input_ids=tokens, moe_mm_token_type_ids=is_image)
    return seen


def test_experts_of_another_modality_see_their_own_tokens():
    text, images = run_with_images("ernie4_5_vl_moe_text")
    assert [routing.router.label for routing in (text, images)] == ["1.text_moe", "1.vision_moe"]
    assert (len(text.logits), len(images.logits)) == (16, 8)
    assert text.kept is None
    assert images.kept is None


def test_a_router_whose_choice_is_nowhere_is_an_error_that_names_it():
    routers = [replace(router, experts_module=None) for router in find_routers(build("dbrx"))]
    with pytest.raises(LayoutError, match=r"'transformer.blocks.0.ffn.router' \(DbrxRouter\) chose cannot be read"):
        run("dbrx", routers)


def test_experts_that_are_not_called_are_an_error():
    """As those of a model are that was given an adapter after its routers were found."""
    model = build("dbrx")
    routers = find_routers(model)
    adapted = get_peft_model(model, MoeLoraConfig(moe_target=["experts"]))
    with RouterTrace(routers, lambda routing: None):
        adapted(**inputs("dbrx"))
        with pytest.raises(LayoutError, match="find the routers again"):
            adapted(**inputs("dbrx"))


def test_logits_of_another_width_are_an_error():
    routers = [replace(router, num_experts=9) for router in find_routers(build("qwen3_moe"))]
    with pytest.raises(
        LayoutError, match=r"logits of 'model.layers.0.mlp.gate' should be of 9 experts; found \(24, 8\)"
    ):
        run("qwen3_moe", routers)


def test_undeclared_logits_that_could_be_two_tensors_are_an_error():
    routers = [replace(router, logits_at=None) for router in find_routers(build("llama4_text"))]
    with pytest.raises(LayoutError, match="should hold one tensor with a logit for each of 8 experts"):
        run("llama4_text", routers)
