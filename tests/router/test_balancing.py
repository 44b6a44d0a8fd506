"""Balancing by a bias: the direction and the size of a step, and that it does balance."""

from __future__ import annotations

import pytest
import torch

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.balancing import bias_step
from trl_moe_ext.router.tokens import count_choices


def test_the_bias_rises_below_the_mean_and_falls_above_it() -> None:
    bias = torch.tensor([0.5, 0.0, -0.25, 1.0])
    before = bias.clone()
    after = bias_step(bias, torch.tensor([0.0, 4.0, 3.0, 9.0]), rate=0.125)  # A mean of 4.
    assert after.tolist() == [0.625, 0.0, -0.125, 0.875]
    assert torch.equal(bias, before), "the bias of the step was changed in place"


@pytest.mark.parametrize("load", [0, 1, 7, 16_777_217])
@pytest.mark.parametrize("experts", [3, 60, 128])
def test_a_balanced_load_changes_nothing(experts: int, load: int) -> None:
    """Also where the sum of the loads is beyond the whole numbers of float32."""
    bias = torch.randn(experts)
    assert torch.equal(bias_step(bias, torch.full((experts,), float(load), dtype=torch.float64), 0.01), bias)


def test_the_smallest_excess_counts() -> None:
    counts = torch.full((4,), 2.0**40, dtype=torch.float64)
    counts[1] += 1
    assert bias_step(torch.zeros(4), counts, 1.0).tolist() == [1.0, -1.0, 1.0, 1.0]


def test_no_graph() -> None:
    bias = torch.zeros(3, requires_grad=True)
    assert not bias_step(bias, torch.tensor([1, 2, 3]), 0.1).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"0\.001 to rounding; keep it in float32"):
        bias_step(torch.ones(4, dtype=dtype), torch.arange(4), 0.001)


def test_a_collapsed_router_becomes_balanced() -> None:
    """Scores that favour two of eight experts; the bias only takes part in the choice."""
    scores = (torch.randn(512, 8) + torch.tensor([4.0, 3.0, 0, 0, 0, 0, 0, 0])).sigmoid()
    bias = torch.zeros(8)
    violations = []
    for _ in range(300):
        counts = count_choices((scores + bias).topk(2, -1).indices, 8)
        violations.append(float(counts.max() / counts.double().mean() - 1))
        bias = bias_step(bias, counts, rate=0.005)
    assert violations[0] > 2
    assert violations[-1] < 0.1
