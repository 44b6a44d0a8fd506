"""Replayed routes are those that the experts get, with the family's own weights and their gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from tests.families import FAMILIES, build, inputs, randomise_factors
from tests.router.replayed import Way, forced, forced_topk, other_routes, recorded, replayed, replaying, run
from tests.router.routed import FORMS, TYPES, called_weights, observe, observed, weights_of_all
from tests.router.test_trace import checkpointed
from tests.tolerances import assert_gradient_close, assert_output_close, relative_error
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError, LayoutError
from trl_moe_ext.router import replay as replay_module
from trl_moe_ext.router.record import RoutingRecord
from trl_moe_ext.router.replay import RoutingReplay
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.scoring import Scoring
from trl_moe_ext.router.trace import RouterTrace, Routing

NO_RULE = "do not follow from its logits by a known rule"
NO_FORM = "in a form in which another cannot be put back"
# Families that are refused by name, and why.
REFUSED = {
    "diffusion_gemma": NO_RULE,  # a learned scale for each expert
    "diffusion_gemma_text": NO_RULE,
    "doge": NO_RULE,  # the weights never leave the block
    "gemma4": NO_RULE,  # a learned scale for each expert
    "gemma4_text": NO_RULE,
    "inkling_mm_model": NO_RULE,  # shared experts take part in the sum, and get weights of their own
    "inkling_text": NO_RULE,
    "nllb-moe": NO_FORM,  # experts with a capacity turn tokens away, of which a record knows nothing
    "phimoe": NO_RULE,  # all but the nearest logits are masked
    "switch_transformers": NO_FORM,  # experts with a capacity
}
WITHOUT_ROUTERS = {"vitpose", "vitpose_backbone"}
REPLAYED = [model_type for model_type in FAMILIES if model_type in TYPES and model_type not in WITHOUT_ROUTERS]
REPLAYED = [model_type for model_type in REPLAYED if model_type not in REFUSED]
COMPOSITES = sorted({*TYPES} - {*FAMILIES} - {*REFUSED} - WITHOUT_ROUTERS)
REPLAYED_FORMS = [model_type for model_type in FORMS if model_type not in REFUSED]


def gradients(model: nn.Module, model_type: str, record: RoutingRecord, way: Way) -> list[Tensor | None]:
    """Of all weights that are trained; a record is held until the backward pass is over."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with way(model, record):
        loss = run(model, model_type).square().mean()
        for weight in weights:
            weight.grad = None
        loss.backward()
    return [weight.grad for weight in weights]


def check_replay(model: nn.Module, model_type: str, record: RoutingRecord) -> None:
    """Fail unless a replay gives what the family's own code gives that is told which experts to pick."""
    with torch.no_grad():
        found, expected = replayed(model, model_type, record), forced(model, model_type, record)
        plain = run(model, model_type)
    assert_output_close(found, expected, found.dtype)
    assert relative_error(plain, expected) > 1e-3, "the routes are those of the model: nothing was tested"


@pytest.mark.parametrize("model_type", REPLAYED)
def test_replay_gives_what_the_family_itself_makes_of_the_routes(model_type):
    model = build(model_type)
    check_replay(model, model_type, other_routes(model_type))
    with torch.no_grad():
        found, expected = replayed(model, model_type, recorded(model, model_type)), run(model, model_type)
    if model_type == "jetmoe":  # sorts its rows again, in an order that depends on the number of threads
        assert_output_close(found, expected, found.dtype)
    else:
        assert torch.equal(found, expected)


def test_tokens_that_skip_the_experts_are_replayed():
    model, other = build("zaya"), other_routes("zaya")
    (skip,) = {router.skip_class for router in find_routers(model)}
    skips = (torch.arange(len(other)) % 3 == 0).unsqueeze(1)
    experts = {label: torch.where(skips, skip, index) for label, index in other.experts.items()}
    check_replay(model, "zaya", RoutingRecord.of(experts, other.num_experts))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", COMPOSITES)
def test_routes_are_replayed_in_composites(model_type):
    test_replay_gives_what_the_family_itself_makes_of_the_routes(model_type)


@pytest.mark.parametrize("model_type", REPLAYED_FORMS)
def test_the_experts_are_called_with_the_recorded_choice(model_type):
    """And with weights by the rule that is known from the family's own routing."""
    model, record = build(model_type), other_routes(model_type)
    with RoutingReplay(find_routers(model)) as replay:
        replay.record = record
        seen = observe(model, model_type)
    rules = {
        routing.router.label: replay_module.recognise_scoring(
            routing.logits, routing.top_k_index, routing.top_k_weights
        )
        for routing in observed(model_type).routings
    }
    for routing in seen.routings:
        index = record.experts[routing.router.label].long()
        weights = rules[routing.router.label].weights(routing.logits.double(), index)
        if model_type == "jetmoe":  # they are applied outside the experts
            weights = torch.ones(index.shape, dtype=torch.float64)
        if routing.router.skip_class is not None:
            weights = torch.where(index == routing.router.skip_class, 0, weights)
        expected = weights_of_all(index, weights, routing.router.num_experts)
        called = called_weights(seen, routing, model_type)
        torch.testing.assert_close(called.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", sorted(REFUSED.keys() & {*FAMILIES}))
def test_refused_families_say_why(model_type):
    model = build(model_type)
    record = recorded(model, model_type)
    router = find_routers(model)[0]
    message = rf"routes of '{router.name}' \({type(router.own).__name__}\) cannot be replayed: .*{REFUSED[model_type]}"
    with torch.no_grad(), pytest.raises(LayoutError, match=message):
        replayed(model, model_type, record)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(REFUSED.keys() - {*FAMILIES}))
def test_refused_composites_say_why(model_type):
    test_refused_families_say_why(model_type)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_half_precision(model_type):
    model = build(model_type, dtype=torch.bfloat16)
    check_replay(model, model_type, other_routes(model_type))
    with torch.no_grad():
        assert torch.equal(replayed(model, model_type, recorded(model, model_type)), run(model, model_type))


@pytest.mark.parametrize("model_type", REPLAYED_FORMS)
def test_adapted_experts_and_routers_are_replayed(model_type):
    model = get_peft_model(build(model_type), MoeLoraConfig(r=2, moe_target=["experts", "router"])).eval()
    randomise_factors(model)
    check_replay(model, model_type, other_routes(model_type))


@pytest.mark.parametrize("model_type", REPLAYED_FORMS)
def test_tokens_without_a_record_are_routed_live(model_type):
    model = build(model_type)
    every = other_routes(model_type)
    is_blank = torch.arange(len(every)) % 3 == 0
    record = every.rows(torch.where(is_blank, -1, torch.arange(len(every))))
    # A token is recorded as a whole or not at all.
    for index in record.experts.values():
        index[1, -1] = -1
    is_blank[1] = True
    before: dict[str, Routing] = {}
    after: dict[str, Routing] = {}
    routers = find_routers(model)
    with (
        torch.no_grad(),
        RouterTrace(routers, lambda routing: before.update({routing.router.label: routing})),
        RoutingReplay(routers) as replay,
        RouterTrace(routers, lambda routing: after.update({routing.router.label: routing})),
    ):
        replay.record = record
        run(model, model_type)
    assert before.keys() == record.experts.keys()
    for label, live in before.items():
        assert torch.equal(after[label].top_k_index[is_blank], live.top_k_index[is_blank])
        assert torch.equal(after[label].top_k_weights[is_blank], live.top_k_weights[is_blank])
        expected = record.experts[label][~is_blank].long().sort(1).values
        assert torch.equal(after[label].top_k_index[~is_blank].sort(1).values, expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("model_type", REPLAYED_FORMS)
def test_gradients_are_the_same_under_checkpointing(model_type, use_reentrant):
    record = other_routes(model_type)
    model = checkpointed(model_type, use_reentrant)
    forwards: list[nn.Module] = []
    for router in find_routers(model):
        router.module.register_forward_hook(lambda module, args, output: forwards.append(module))
    found = gradients(model, model_type, record, replaying)
    assert len(forwards) == 2 * len(record.experts), "nothing was computed again: nothing was tested"
    plain = build(model_type).train()
    expected = gradients(plain, model_type, record, replaying)
    assert sum(gradient is not None for gradient in expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("exchanged", ["another record", "no record"])
def test_a_record_that_is_exchanged_before_the_recomputation_is_noticed(exchanged):
    model, record = checkpointed("qwen3_moe", use_reentrant=False), other_routes("qwen3_moe")
    with RoutingReplay(find_routers(model)) as replay:
        replay.record = record
        loss = run(model, "qwen3_moe").square().mean()
        replay.record = record.rows(slice(None)) if exchanged == "another record" else None
        with pytest.raises(CheckpointError):
            loss.backward()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"], ids=["softmax", "sigmoid"])
def test_gradients_flow_to_the_router_through_the_weights(model_type):
    """As in the family's own code, in float64."""
    record = other_routes(model_type)
    model = build(model_type, dtype=torch.float64).train()
    model.set_experts_implementation("eager")
    found = gradients(model, model_type, record, replaying)
    expected = gradients(model, model_type, record, forced_topk)
    live = gradients(model, model_type, RoutingRecord.blank(find_routers(model), len(record)), replaying)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    routers = [router.name for router in find_routers(model)]
    for name, ours, theirs, other in zip(names, found, expected, live, strict=True):
        # The softmax of some families is in float32.
        assert_gradient_close(ours, theirs, torch.float32, name)
        if name.rpartition(".")[0] in routers:
            assert theirs.abs().max() > 0
            assert relative_error(other, theirs) > 1e-3


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_gradients_of_an_adapted_router_are_those_of_the_family(model_type):
    model = get_peft_model(build(model_type), MoeLoraConfig(r=2, moe_target=["experts", "router"])).train()
    randomise_factors(model)
    record = other_routes(model_type)
    found, expected = (gradients(model, model_type, record, way) for way in (replaying, forced_topk))
    for ours, theirs in zip(found, expected, strict=True):
        assert_gradient_close(ours, theirs, torch.float32, "a factor")


def test_a_rule_that_few_tokens_left_open_is_found_again():
    """In half precision the weights of a single token could be normalised or not."""
    model, record = build("olmoe", dtype=torch.bfloat16), other_routes("olmoe")
    with torch.no_grad(), RoutingReplay(find_routers(model)) as replay:
        replay.record = record.rows(slice(1))
        model(input_ids=inputs("olmoe")["input_ids"][:1, :1])
        replay.record = record
        found = run(model, "olmoe")
        expected = forced(model, "olmoe", record)
    assert_output_close(found, expected, torch.bfloat16)


def test_only_what_the_record_knows_is_replayed():
    model, record = build("qwen3_moe"), other_routes("qwen3_moe")
    label = find_routers(model)[1].label
    partial = RoutingRecord.of({label: record.experts[label]}, record.num_experts)
    own = recorded(model, "qwen3_moe")
    mixed = RoutingRecord.of({**own.experts, label: record.experts[label]}, record.num_experts)
    with torch.no_grad():
        expected = forced(model, "qwen3_moe", mixed)
        assert_output_close(replayed(model, "qwen3_moe", partial), expected, torch.float32)


def test_without_a_record_and_after_removal_nothing_is_replayed():
    model, record = build("dbrx"), other_routes("dbrx")
    with torch.no_grad():
        expected = run(model, "dbrx")
        with RoutingReplay(find_routers(model)) as replay:
            assert torch.equal(run(model, "dbrx"), expected)
            replay.attach()
            replay.record = record
            assert not torch.equal(run(model, "dbrx"), expected)
            replay.record = None
            assert torch.equal(run(model, "dbrx"), expected)
            replay.record = record
        assert replay.record is None
        assert torch.equal(run(model, "dbrx"), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_router_without_tokens_is_left_alone():
    model = build("qwen3_moe")
    routers = find_routers(model)
    with RoutingReplay(routers) as replay:
        replay.record = RoutingRecord.blank(routers, 0)
        logits, weights, index = routers[0].module(torch.zeros(0, model.config.hidden_size))
    assert (len(logits), len(weights), len(index)) == (0, 0, 0)


def test_a_record_of_other_tokens_is_an_error():
    model, record = build("qwen3_moe"), other_routes("qwen3_moe")
    with RoutingReplay(find_routers(model)) as replay:
        replay.record = record.rows(slice(10))
        with pytest.raises(ConfigError, match=r"record is of 10 tokens, but 'model.layers.0.mlp.gate' saw 24"):
            run(model, "qwen3_moe")


def test_a_record_of_another_model_is_an_error():
    replay = RoutingReplay(find_routers(build("qwen3_moe")))
    record = other_routes("qwen3_moe")
    wider = RoutingRecord.of(record.experts, dict.fromkeys(record.num_experts, 64))
    with pytest.raises(ConfigError, match=r"picks 2 of 64 experts, are of another model: this one has 2 of 8"):
        replay.record = wider
    with pytest.raises(ConfigError, match="no router of that label"):
        replay.record = RoutingRecord.of({"7": record.experts["0"]}, {"7": 8})
    assert replay.record is None


def test_a_choice_that_is_nowhere_is_an_error():
    model, record = build("dbrx"), other_routes("dbrx")
    with RoutingReplay([replace(router, experts_module=None) for router in find_routers(model)]) as replay:
        replay.record = record
        with pytest.raises(LayoutError, match="does not hold the choice, and its experts were not called"):
            run(model, "dbrx")


def test_experts_that_are_not_called_are_an_error():
    """As those of a model are that was given an adapter after its routers were found."""
    model, record = build("dbrx"), other_routes("dbrx")
    replay = RoutingReplay(find_routers(model))
    adapted = get_peft_model(model, MoeLoraConfig(moe_target=["experts"]))
    with replay:
        replay.record = record
        run(adapted, "dbrx")
        with pytest.raises(LayoutError, match="its experts were not called"):
            run(adapted, "dbrx")


def differing(record: RoutingRecord, routings: list[Routing]) -> tuple[dict[str, float], float]:
    """Shares of the tokens with other experts, per layer and in any layer, one token after the other."""
    by_layer = {
        routing.router.label: [
            {*mine} != {*theirs}
            for mine, theirs in zip(
                record.experts[routing.router.label].tolist(), routing.top_k_index.tolist(), strict=True
            )
        ]
        for routing in routings
    }
    anywhere = [any(token) for token in zip(*by_layer.values(), strict=True)]
    return {label: sum(each) / len(each) for label, each in by_layer.items()}, sum(anywhere) / len(anywhere)


@pytest.mark.parametrize("compare_only", [False, True], ids=["replayed", "compared"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "dbrx", "llama4_text"])
def test_the_mismatch_is_that_of_the_live_choice(model_type, compare_only):
    model = build(model_type)
    record = recorded(build(model_type), model_type)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * weight.std() * torch.randn_like(weight))
    live: list[Routing] = []
    routers = find_routers(model)
    with (
        torch.no_grad(),
        RouterTrace(routers, live.append),
        RoutingReplay(routers, compare_only=compare_only) as replay,
    ):
        replay.record = record
        run(model, model_type)
        metrics = replay.take_mismatch().metrics()
        assert replay.take_mismatch().metrics() == {}
    layers, anywhere = differing(record, live)
    assert 0 < anywhere < 1, "all tokens or none differ: nothing was tested"
    assert metrics == pytest.approx(
        {
            "router/replay_mismatch": sum(layers.values()) / len(layers),
            "router/replay_mismatch_any": anywhere,
            **{f"router/replay_mismatch/{label}": share for label, share in layers.items()},
        }
    )


@pytest.mark.parametrize("model_type", FORMS)
def test_comparing_changes_nothing_in_any_family(model_type):
    model, record = build(model_type), other_routes(model_type)
    with torch.no_grad(), RoutingReplay(find_routers(model), compare_only=True) as replay:
        expected = run(model, model_type)
        replay.record = record
        assert torch.equal(run(model, model_type), expected)
        replay.record = recorded(model, model_type)
        run(model, model_type)
        tokens = replay.take_mismatch().tokens
    assert {float(count) for count in tokens.values()} == {2 * len(record)}


def test_a_recomputation_is_not_counted():
    model, record = checkpointed("qwen3_moe", use_reentrant=False), other_routes("qwen3_moe")
    with RoutingReplay(find_routers(model)) as replay:
        replay.record = record
        loss = run(model, "qwen3_moe").square().mean()
        assert replay.take_mismatch().metrics()
        loss.backward()
        assert not replay.take_mismatch().metrics()


MUTATIONS = {
    "nothing is replayed": lambda m: m.setattr(
        replay_module, "differing_tokens", lambda recorded, index: torch.zeros(len(index), dtype=torch.bool)
    ),
    "the next token's routes": lambda m: m.setattr(
        RoutingReplay, "_record_of", lambda self, router, num: self._record.experts[router.label].roll(1, 0)
    ),
    "live weights": lambda m: m.setattr(
        Scoring, "weights", lambda self, logits, index: logits.softmax(-1).topk(index.shape[1]).values
    ),
    "another scale": lambda m: m.setattr(Scoring, "weights", lambda *args: 1.001 * WEIGHTS(*args)),
}
WEIGHTS = Scoring.weights


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "dbrx", "llama4_text", "jetmoe"])
def test_another_replay_does_not_pass(model_type, mutation, monkeypatch):
    record = other_routes(model_type)
    if model_type == "dbrx" and "weights" in mutation:
        pytest.skip("its tiny model chooses one expert, whose weight is always one")
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises(AssertionError):
        check_replay(build(model_type), model_type, record)


def test_weights_without_a_gradient_do_not_pass(monkeypatch):
    monkeypatch.setattr(Scoring, "weights", lambda *args: WEIGHTS(*args).detach())
    with pytest.raises(AssertionError):
        test_gradients_flow_to_the_router_through_the_weights("qwen3_moe")


def test_a_rule_that_is_not_found_again_does_not_pass(monkeypatch):
    monkeypatch.setattr(replay_module, "_ENOUGH", 0)
    with pytest.raises(AssertionError):
        test_a_rule_that_few_tokens_left_open_is_found_again()
