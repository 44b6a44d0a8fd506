"""The loss of a token: by hand, against TRL's own where they coincide, and that a masked token adds nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trl_moe_ext.grpo.loss.importance import ImportanceCorrection
from trl_moe_ext.grpo.loss.objective import mean_of_step, policy_loss

RATIOS = torch.tensor([4.0, 0.5, 1.0, 0.25], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
SEQUENCE = torch.tensor([0, 0, 1, 1])
GENERATOR = torch.tensor([-2.0, -1.0, -0.5, -3.0], dtype=torch.float64)
ALL = torch.ones(4, dtype=torch.bool)
UNCAPPED = ImportanceCorrection("token", "tis", cap=math.inf)


def gradient(correction: ImportanceCorrection, ratios: Tensor = RATIOS) -> tuple[Tensor, Tensor]:
    """The losses, and the gradient of their sum by the log-probabilities."""
    log_probs = (GENERATOR + ratios.log()).requires_grad_()
    losses = policy_loss(log_probs, ADVANTAGES, correction.correct(log_probs, GENERATOR, ALL, SEQUENCE))
    losses.sum().backward()
    assert log_probs.grad is not None
    return losses.detach(), log_probs.grad


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        (ImportanceCorrection("token", "tis", cap=2.0), [2.0, 0.5, 1.0, 0.25]),
        (ImportanceCorrection("token", "mis", cap=2.0, floor=0.3), [0.0, 0.5, 1.0, 0.0]),
        (ImportanceCorrection("sequence", "tis", cap=1.5), [1.5, 1.5, 0.25, 0.25]),
        (ImportanceCorrection("geometric", "tis", cap=3.0), [2**0.5, 2**0.5, 0.5, 0.5]),
    ],
    ids=["token-tis", "token-mis", "sequence-tis", "geometric-tis"],
)
def test_by_hand(correction, weights):
    """Value and gradient of a token are the same number: minus its weight times its advantage."""
    expected = -torch.tensor(weights, dtype=torch.float64) * ADVANTAGES
    for found in gradient(correction):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_uncapped_weights_of_tokens_have_the_gradient_of_trls_loss_without_clipping():
    log_probs = (GENERATOR + RATIOS.log()).requires_grad_()
    (-(log_probs - GENERATOR).exp() * ADVANTAGES).sum().backward()
    torch.testing.assert_close(gradient(UNCAPPED)[1], log_probs.grad, rtol=1e-12, atol=0)


def test_a_token_that_clipping_would_drop_keeps_a_bounded_gradient():
    """A ratio of 4 and a positive advantage: TRL's clipped loss is flat there."""
    assert gradient(ImportanceCorrection("token", "tis", cap=2.0))[1][0] == -2.0


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["tis", "mis"])
def test_tokens_of_the_policy_itself_have_the_plain_policy_gradient(level, mode):
    found = gradient(ImportanceCorrection(level, mode, cap=1.0), torch.ones(4, dtype=torch.float64))[1]
    assert torch.equal(found, -ADVANTAGES)


VALUES = st.floats(-30, 0) | st.sampled_from([math.nan, math.inf, -math.inf])


@given(masked=st.lists(st.tuples(VALUES, VALUES, st.floats(-5, 5) | st.just(math.nan)), min_size=1, max_size=4))
def test_a_masked_token_never_contributes(masked):
    """Whatever stands there: loss and gradient of the others are those without it, and its own are 0."""
    extra = torch.tensor(masked, dtype=torch.float64)
    mask = torch.cat([ALL, torch.zeros(len(masked), dtype=torch.bool)])
    log_probs = torch.cat([GENERATOR + RATIOS.log(), extra[:, 0]]).requires_grad_()
    sequence = torch.cat([SEQUENCE, torch.full((len(masked),), -1)])
    correction = ImportanceCorrection("sequence", "tis", cap=1.5)
    corrected = correction.correct(log_probs, torch.cat([GENERATOR, extra[:, 1]]), mask, sequence)
    losses = policy_loss(log_probs, torch.cat([ADVANTAGES, extra[:, 2]]), corrected)
    losses.sum().backward()
    expected_losses, expected_gradient = gradient(correction)
    nothing = torch.zeros(len(masked), dtype=torch.float64)
    torch.testing.assert_close(losses.detach(), torch.cat([expected_losses, nothing]), rtol=0, atol=0)
    torch.testing.assert_close(log_probs.grad, torch.cat([expected_gradient, nothing]), rtol=0, atol=0)


def test_what_a_process_adds_to_the_loss_of_a_step():
    """Six tokens in two processes, of which this one has two; four micro-batches: 2 of the loss / 3 tokens / 4."""
    losses = torch.tensor([1.0, 1.0])
    assert mean_of_step(losses, torch.tensor(6.0), 2, 4) == pytest.approx(2 / 3 / 4)
    assert mean_of_step(losses[:0], torch.tensor(0.0), 2, 4) == 0.0
