"""Statistics of a routing: against loops over the tokens, and as sums."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import nn

from tests.router.observed import observed, split_routings
from trl_moe_ext.router.routers import Router
from trl_moe_ext.router.statistics import DriftStatistics, LayerStatistics, as_sum
from trl_moe_ext.router.tokens import count_choices, only_kept
from trl_moe_ext.router.trace import Routing


def by_loops(routing: Any) -> dict[str, Any]:
    """The fields of `LayerStatistics` by their definitions, in Python's floats."""
    experts = routing.probabilities.shape[1]
    fields: dict[str, Any] = {
        "tokens": 0,
        "counts": [0.0] * experts,
        "probabilities": [0.0] * experts,
        "entropy": 0.0,
        "mass": 0.0,
    }
    for t, (row, chosen) in enumerate(zip(routing.probabilities.tolist(), routing.top_k_index.tolist())):
        if routing.kept is not None and not routing.kept[t]:
            continue
        fields["tokens"] += 1
        for e, p in enumerate(row):
            fields["counts"][e] += e in chosen
            fields["probabilities"][e] += p
            fields["entropy"] -= p * math.log(p) / math.log(experts) if experts > 1 and p > 0 else 0.0
            fields["mass"] += p if e in chosen else 0.0
    return fields


def assert_same(statistics: LayerStatistics, fields: dict[str, Any], tolerance: float = 1e-12) -> None:
    for name, expected in fields.items():
        wanted = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(getattr(statistics, name), wanted, rtol=tolerance, atol=tolerance)


@given(split_routings())
def test_statistics_are_those_of_the_loops_and_add_up(split: Any) -> None:
    whole, parts = split
    padding = ~whole.kept.unsqueeze(1)
    whole.probabilities = whole.probabilities.masked_fill(padding, math.nan)
    assert_same(LayerStatistics.of(whole), by_loops(whole))
    assert_same(reduce(add, (LayerStatistics.of(part) for part in parts)), by_loops(whole))


@given(split_routings())
def test_vectors_of_processes_add_up_as_the_statistics_do(split: Any) -> None:
    _, parts = split
    statistics = [LayerStatistics.of(part) for part in parts]
    vector = torch.stack([each.as_vector() for each in statistics]).sum(0)
    assert vector.dtype == torch.float64
    assert torch.equal(reduce(add, statistics).as_vector(), vector)
    assert torch.equal(LayerStatistics.from_vector(vector).as_vector(), vector)
    again = LayerStatistics.from_vector(vector)
    assert [again.tokens.shape, again.entropy.shape, again.mass.shape] == [()] * 3


def test_every_field_comes_back_from_a_vector_at_its_place() -> None:
    numbers = iter(range(100))
    layer = LayerStatistics(*(torch.tensor([next(numbers) for _ in range(n)]).squeeze() for n in (1, 5, 5, 1, 1)))
    again = LayerStatistics.from_vector(layer.as_vector())
    assert all((getattr(again, name) == value).all() for name, value in vars(layer).items())
    drift = DriftStatistics(*torch.arange(4.0).unbind())
    assert DriftStatistics.from_vector(drift.as_vector()) == drift
    assert (drift + drift).as_vector().tolist() == [0, 2, 4, 6]


def test_a_mask_that_is_forgotten_is_noticed() -> None:
    routing = observed(torch.rand(6, 4, dtype=torch.float64).softmax(-1), 2, torch.arange(6) < 4)
    expected = by_loops(routing)
    assert_same(LayerStatistics.of(routing), expected)
    routing.kept = None
    with pytest.raises(AssertionError):
        assert_same(LayerStatistics.of(routing), expected)


def test_float32_statistics_are_exact_to_rounding_and_sum_in_float64() -> None:
    routing = observed((3 * torch.randn(300, 16)).softmax(-1), 4)
    statistics = LayerStatistics.of(routing)
    assert_same(statistics, by_loops(routing), tolerance=1e-6)
    assert {value.dtype for value in vars(statistics).values()} == {torch.float64}


def test_many_tokens_are_counted_exactly() -> None:
    """Beyond 2^24 a float32 does not take one more."""
    one = LayerStatistics.of(observed(torch.tensor([[0.75, 0.25]]), 1))
    many = LayerStatistics(
        *(value * 2**24 for value in (one.tokens, one.counts, one.probabilities, one.entropy, one.mass))
    )
    assert (many + one).counts.tolist() == [2**24 + 1, 0]


def test_statistics_have_no_graph_and_leave_that_of_the_routing_alone() -> None:
    """A routing computes its probabilities when they are first asked for, and keeps them."""
    logits = torch.randn(5, 4, requires_grad=True)
    router = Router("gate", nn.Identity(), num_experts=4, top_k=2, experts="experts", label="0")
    routing = Routing(router, logits, logits.topk(2, -1).indices, None, None, "softmax")
    statistics = LayerStatistics.of(routing)
    assert not any(value.requires_grad for value in vars(statistics).values())
    assert routing.probabilities.requires_grad
    assert_same(statistics, by_loops(routing), tolerance=1e-6)


def test_slots_that_name_no_expert_are_not_counted() -> None:
    """-1 was not recorded, E is on another device."""
    routing = observed(torch.full((2, 4), 0.25), 2)
    routing.top_k_index = torch.tensor([[0, -1], [4, 3]])
    statistics = LayerStatistics.of(routing)
    assert statistics.counts.tolist() == [1, 0, 0, 1]
    assert statistics.mass.item() == 0.5


def test_counts_without_a_mask_are_those_of_bincount() -> None:
    index = torch.rand(50, 9).topk(3, -1).indices
    assert torch.equal(count_choices(index, 9), index.flatten().bincount(minlength=9))


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2)])
def test_only_kept_takes_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    values = torch.full(shape, math.nan)
    values[1] = 2.0
    kept = only_kept(values, torch.tensor([False, True, False, False]))
    assert (kept[1] == 2).all()
    assert (kept[[0, 2, 3]] == 0).all()
    assert only_kept(values, None) is values


def test_statistics_never_wait_for_the_device() -> None:
    """Reading a value of a meta tensor is an error, as there is none."""
    probabilities = torch.empty(6, 4, device="meta").softmax(-1)
    for kept in (None, torch.empty(6, dtype=torch.bool, device="meta")):
        vector = LayerStatistics.of(observed(probabilities, 2, kept)).as_vector()
        assert (vector.device.type, vector.dtype, vector.shape) == ("meta", torch.float64, (11,))


def test_sums_are_as_wide_as_the_device_allows() -> None:
    """Apple's devices have no float64, and none of them is needed to ask for the dtype."""

    class OnApple:
        device = torch.device("mps")

        def to(self, dtype: torch.dtype) -> torch.dtype:
            return dtype

    assert as_sum(OnApple()) is torch.float32  # type: ignore[arg-type, comparison-overlap]
    assert as_sum(torch.tensor(1)).dtype is torch.float64
