"""The trace tells what each family's own code does: its logits, its choice and its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.families import build
from tests.router.routed import NOT_REACHED, TYPES, Observed, called_weights, observe, observed, run, weights_of_all
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.scoring import recognise_scoring
from trl_moe_ext.router.trace import RouterTrace, Routing

# Types whose outermost class does not hand router logits out; its parts, which record them, are types of their own.
NOT_RECORDED = {
    "diffusion_gemma",
    "dots3_note_vision_encoder",  # declares nothing: found by structure
    "kimi_k25",
    "mistral3",
    "nemo_speechlm",
    "nemotron_h_omni",
    "openai_privacy_filter",  # a classifier of tokens, whose output has no field for them
    "vitpose",
    "vitpose_backbone",
}
# No rule from logits to weights: see trl_moe_ext/router/scoring.py.
WITHOUT_RULE = {
    "diffusion_gemma": "a learned scale for each expert",
    "diffusion_gemma_text": "a learned scale for each expert",
    "doge": "the weights never leave the block",
    "gemma4": "a learned scale for each expert",
    "gemma4_text": "a learned scale for each expert",
    "inkling_mm_model": "shared experts take part in the sum",
    "inkling_text": "shared experts take part in the sum",
    "phimoe": "all but the nearest logits are masked",
}


def check_logits(routings: list[Routing], recorded: list[Tensor], model_type: str) -> None:
    """Fail unless the logits are those that the family records, to the last bit."""
    if model_type == "doge":
        recorded = [(x[:, :, None] + y[:, None, :]).flatten(1) for x, y in recorded]
    if model_type == "jetmoe":  # the router of attention is recorded twice: by itself and by the attention around it
        recorded = recorded[::3] + recorded[2::3]
        routings = routings[::2] + routings[1::2]
    assert len(recorded) == len(routings)
    for routing, logits in zip(routings, recorded, strict=True):
        assert torch.equal(routing.logits, logits.reshape(routing.logits.shape))


def check_choices(seen: Observed, model_type: str) -> None:
    """Fail unless choices and weights are what the experts were called with."""
    for routing in seen.routings:
        weights = routing.top_k_weights
        if weights is None or model_type == "jetmoe":  # they are applied outside the experts
            weights = torch.ones(routing.top_k_index.shape)
        expected = called_weights(seen, routing, model_type)
        found = weights_of_all(routing.top_k_index, weights, expected.shape[1])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("model_type", TYPES)
def test_every_router_is_seen_once(model_type):
    seen = observed(model_type)
    missing = NOT_REACHED.get(model_type, "\0")
    expected = [router.name for router in seen.routers if missing not in router.name]
    assert sorted(routing.router.name for routing in seen.routings) == sorted(expected)


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_those_that_the_family_records(model_type):
    seen = observed(model_type)
    assert (seen.recorded is None) is (model_type in NOT_RECORDED)
    if seen.recorded is not None:
        check_logits(seen.routings, seen.recorded, model_type)


@pytest.mark.parametrize("model_type", TYPES)
def test_choice_and_weights_are_those_that_the_experts_are_called_with(model_type):
    check_choices(observed(model_type), model_type)


@pytest.mark.parametrize("model_type", ["dbrx", "nllb-moe", "phimoe", "qwen3_moe", "switch_transformers"])
def test_in_training_the_choice_is_the_one_that_was_made(model_type):
    """Phi's routers draw their experts at random then."""
    check_choices(observe(build(model_type).train(), model_type), model_type)


def test_weights_of_sorted_rows_are_brought_back_in_order():
    """JetMoe's are the softmax of the chosen logits."""
    for routing in observed("jetmoe").routings:
        chosen = routing.logits.gather(1, routing.top_k_index)
        torch.testing.assert_close(routing.top_k_weights, chosen.softmax(-1))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_rule_of_the_family_is_recognised_and_gives_its_weights(model_type):
    for routing in observed(model_type).routings:
        known = routing.top_k_weights is not None
        scoring = recognise_scoring(routing.logits, routing.top_k_index, routing.top_k_weights) if known else None
        assert (scoring is None) is (model_type in WITHOUT_RULE), scoring
        if scoring is not None:
            found = scoring.weights(routing.logits, routing.top_k_index)
            found = torch.where(routing.top_k_weights == 0, 0, found)  # turned away, or sent to no expert
            torch.testing.assert_close(found, routing.top_k_weights.float(), rtol=4e-6, atol=0)


# Every family that does not take the softmax.
SCORES = {
    "sigmoid": {
        *("afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note"),
        *("dots3_note_text", "dots3_note_vision_encoder", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite"),
        *("glm4v_moe", "glm4v_moe_text", "glm5_next", "glm5_next_text", "glm_moe_dsa", "hy_v3", "hy_v4", "inkling2"),
        *("inkling2_text", "inkling_mm_model", "inkling_text", "kimi_k25", "kimi_linear", "kolibri1", "laguna"),
        *("lfm2_moe", "llama4", "llama4_text", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "minimax_m3_vl_text"),
        *("muse_spark", "muse_spark_text", "nemo_speechlm", "nemotron_h", "nemotron_h_omni", "solar_open", "step3p5"),
        "step3p7",
    },
    "sqrt_softplus": {"deepseek_v4"},
    "probabilities": {"diffusion_gemma", "diffusion_gemma_text", "gemma4", "gemma4_text"},
}


@pytest.mark.parametrize("model_type", TYPES)
def test_scores_are_told_for_every_family(model_type):
    expected = next((scores for scores, types in SCORES.items() if model_type in types), "softmax")
    for routing in observed(model_type).routings:
        assert routing.scores == expected
        assert routing.probabilities.dtype == torch.float32
        torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(len(routing.logits)))
        # A routing that is made by hand, without scores, finds them by itself.
        assert torch.equal(replace(routing, scores=None).probabilities, routing.probabilities)


def test_logits_at_another_position_do_not_pass():
    routers = [replace(router, logits_at=0) for router in find_routers(build("llama4_text"))]
    with pytest.raises(AssertionError):
        check_logits(run("llama4_text", routers), observed("llama4_text").recorded, "llama4_text")


SHIFTS = {
    "by one expert": lambda choice, E: choice._replace(top_k_index=(choice.top_k_index + 1) % E),
    "by one token": lambda choice, E: choice._replace(top_k_index=choice.top_k_index.roll(1, 0)),
    "weights by one token": lambda choice, E: choice._replace(top_k_weights=choice.top_k_weights.roll(1, 0)),
}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "nllb-moe", "switch_transformers", "dbrx"])
def test_a_choice_that_is_shifted_does_not_pass(model_type, shift, monkeypatch):
    if (model_type, shift) == ("dbrx", "weights by one token"):
        pytest.skip("its tiny model chooses one expert, whose weight is always one")
    tell = RouterTrace._tell

    def shifted(self, router, logits, choice):
        tell(self, router, logits, SHIFTS[shift](choice, router.num_experts))

    monkeypatch.setattr(RouterTrace, "_tell", shifted)
    with pytest.raises(AssertionError):
        check_choices(observe(build(model_type), model_type), model_type)
