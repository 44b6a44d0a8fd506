"""The rule from logits to weights is found from one routing, and gives the weights of any other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_moe_ext.router.scoring import Scoring, as_probabilities, recognise_scores, recognise_scoring

T, E, K = 40, 12, 3
RULES = [
    Scoring(scores, normalised, scale)
    for scores in ("softmax", "sigmoid", "sqrt_softplus", "probabilities")
    for normalised in (True, False)
    for scale in (1.0, 2.5)
]
NAMES = [f"{rule.scores}{'-normalised' * rule.normalised}-{rule.scale}" for rule in RULES]


def routing(rule: Scoring, dtype=torch.float32, top_k=K, seed=0):
    """Logits, a choice that is not the largest logits everywhere, and the weights, in the order that families use."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, generator=generator).to(dtype)
    logits = logits.softmax(-1) if rule.scores == "probabilities" else logits
    index = (logits.float() + 0.1 * torch.randn(T, E, generator=generator)).topk(top_k).indices
    x = logits.float()
    scores = {
        "softmax": lambda: torch.exp(x) / torch.exp(x).sum(-1, keepdim=True),
        "sigmoid": lambda: 1 / (1 + torch.exp(-x)),
        "sqrt_softplus": lambda: torch.log1p(torch.exp(x)) ** 0.5,
        "probabilities": lambda: x,
    }[rule.scores]()
    weights = scores.gather(1, index).to(dtype)
    if rule.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return logits, index, weights * rule.scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_rule_is_found(rule, dtype):
    found = recognise_scoring(*routing(rule, dtype))
    assert found is not None
    assert (found.scores, found.normalised) == (rule.scores, rule.normalised)
    assert found.scale == pytest.approx(rule.scale, rel=1e-6 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_weights_are_those_of_any_choice(rule):
    logits, _, _ = routing(rule)
    found = recognise_scoring(*routing(rule, seed=1))
    index = torch.randint(E, (T, K), generator=torch.Generator().manual_seed(2))
    scores = Scoring(rule.scores, normalised=False, scale=1.0).weights(logits.double(), index)
    expected = scores / scores.sum(-1, keepdim=True) if rule.normalised else scores
    torch.testing.assert_close(found.weights(logits, index), (expected * rule.scale).float(), rtol=1e-5, atol=0)


def test_weights_have_the_gradient_of_live_logits():
    rule = Scoring("sigmoid", normalised=True, scale=2.5)
    logits = torch.randn(4, E, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 3], [1, 2], [5, 4], [7, 11]])
    assert torch.autograd.gradcheck(lambda x: rule.weights(x, index), logits)


@given(scale=st.decimals(min_value="0.01", max_value="20", places=3).filter(lambda scale: scale > 0))
def test_a_scale_is_found_as_it_stands_in_the_config(scale):
    rule = Scoring("sigmoid", normalised=True, scale=float(scale))
    assert recognise_scoring(*routing(rule)) == rule


def test_a_scale_that_is_no_short_number_is_found():
    """The weights of the privacy filter of OpenAI are divided by top_k."""
    found = recognise_scoring(*routing(Scoring("softmax", normalised=True, scale=1 / 3)))
    assert found.scale == pytest.approx(1 / 3, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_follows_no_rule_is_not_recognised(dtype):
    logits, index, weights = routing(RULES[0], dtype)
    per_expert = torch.linspace(0.5, 2, E).to(dtype)
    assert recognise_scoring(logits, index, weights * per_expert[index]) is None
    assert recognise_scoring(logits, index, weights.flip(0)) is None
    assert recognise_scoring(logits, index.flip(1), weights) is None
    assert recognise_scoring(logits.roll(1, dims=1), index, weights) is None


def test_tokens_that_were_turned_away_are_not_looked_at():
    rule = Scoring("softmax", normalised=False, scale=1.0)
    logits, index, weights = routing(rule)
    weights[::2, 1] = 0
    assert recognise_scoring(logits, index, weights) == rule
    assert recognise_scoring(logits, index, weights * 0) is None


def test_scores_are_told_where_a_token_has_a_factor_of_its_own():
    """As in Inkling, whose shared experts take part in the sum by which the weights are divided."""
    logits, index, weights = routing(Scoring("sigmoid", normalised=True, scale=1.0))
    weights = weights * torch.linspace(0.2, 0.9, T).unsqueeze(1)
    assert recognise_scoring(logits, index, weights) is None
    assert recognise_scores(logits, index, weights) == "sigmoid"


def test_probabilities_are_known_by_their_sum():
    logits, index, weights = routing(Scoring("probabilities", normalised=True, scale=1.0))
    per_expert = torch.linspace(0.5, 2, E)
    assert recognise_scores(logits, index, weights * per_expert[index]) == "probabilities"
    assert recognise_scores(logits, index, None) == "probabilities"
    assert recognise_scores(logits.log(), index, None) is None


@pytest.mark.parametrize("rule", RULES[::4], ids=NAMES[::4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_probabilities_are_float32_and_sum_to_one(rule, dtype):
    logits, _, _ = routing(rule, dtype)
    logits.requires_grad_()
    found = rule.probabilities(logits)
    assert found.dtype == torch.float32
    assert found.requires_grad
    torch.testing.assert_close(found.sum(-1), torch.ones(T), rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(found.argmax(-1), logits.float().argmax(-1))


def test_probabilities_of_the_sigmoid_are_its_shares():
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    scores = [1 / (1 + 2.718281828459045**-x) for x in (0.0, 2.0, -1.0)]
    expected = torch.tensor([[score / sum(scores) for score in scores]])
    torch.testing.assert_close(as_probabilities(logits, "sigmoid"), expected)
