"""Metrics of routers: known routings have known values, and a summary has the documented keys."""

from __future__ import annotations

import math
from functools import reduce
from operator import add
from typing import Any

import pytest
import torch
from hypothesis import given

from tests.router.observed import observed, part_of, split_routings
from trl_moe_ext.router import metrics
from trl_moe_ext.router.losses import kl_divergence
from trl_moe_ext.router.statistics import DriftStatistics, LayerStatistics

EXPERTS, TOP_K = 6, 2
PREFERENCES = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, -1.0], dtype=torch.float64)


def balanced() -> LayerStatistics:
    """Six tokens, the same preferences for other experts each time."""
    logits = torch.stack([PREFERENCES.roll(shift) for shift in range(EXPERTS)])
    return LayerStatistics.of(observed(logits.softmax(-1), TOP_K))


def collapsed() -> LayerStatistics:
    """Six tokens that are all sure of the same two experts."""
    logits = torch.tensor([800.0, 800.0, 0, 0, 0, 0], dtype=torch.float64).expand(6, -1)
    return LayerStatistics.of(observed(logits.softmax(-1), TOP_K))


def nothing() -> LayerStatistics:
    return LayerStatistics.of(observed(torch.zeros(0, EXPERTS), TOP_K))


def test_a_balanced_router() -> None:
    layer = balanced()
    torch.testing.assert_close(metrics.load_share(layer), torch.full((EXPERTS,), 1 / 6, dtype=torch.float64))
    assert metrics.max_vio(layer).item() == 0
    assert metrics.dead_experts(layer).item() == 0
    p = PREFERENCES.softmax(-1)
    torch.testing.assert_close(metrics.selected_mass(layer), p[0] + p[1])
    torch.testing.assert_close(metrics.normalised_entropy(layer), -(p * p.log()).sum() / math.log(EXPERTS))


def test_a_collapsed_router() -> None:
    layer = collapsed()
    assert metrics.load_share(layer).tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert metrics.max_vio(layer).item() == EXPERTS / TOP_K - 1
    assert metrics.dead_experts(layer).item() == EXPERTS - TOP_K
    assert metrics.selected_mass(layer).item() == 1
    torch.testing.assert_close(metrics.normalised_entropy(layer).item(), math.log(2) / math.log(EXPERTS))


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1e4, 0.0)])
def test_entropy_of_an_undecided_and_of_a_certain_router(scale: float, expected: float) -> None:
    layer = LayerStatistics.of(observed((scale * torch.randn(9, 5)).softmax(-1), 1))
    torch.testing.assert_close(metrics.normalised_entropy(layer).item(), expected, rtol=1e-6, atol=1e-6)


def test_max_vio_of_an_uneven_load() -> None:
    """Loads 1, 5 and 0 have the mean 2."""
    logits = torch.tensor([[1.0, 0, 0]] + [[0, 1.0, 0]] * 5)
    layer = LayerStatistics.of(observed(logits.softmax(-1), 1))
    assert metrics.max_vio(layer).item() == 1.5
    assert metrics.dead_experts(layer).item() == 1


def test_a_router_without_tokens_has_no_metrics() -> None:
    for name in ("aux_loss", "max_vio", "normalised_entropy", "dead_experts", "selected_mass"):
        assert getattr(metrics, name)(nothing()).isnan()
    assert metrics.load_share(nothing()).isnan().all()


def test_summary_of_several_routers() -> None:
    layers = {"0": balanced(), "3": collapsed(), "encoder.3": collapsed(), "5": nothing()}
    summary = metrics.summarise(layers)
    assert summary["router/max_vio"] == pytest.approx(2 * 2.0 / 3)
    assert summary["router/max_vio_max"] == 2.0
    assert summary["router/dead_experts"] == 8
    assert summary["router/selected_mass"] == pytest.approx((summary["router/selected_mass/0"] + 2) / 3)
    assert summary["router/entropy"] == pytest.approx((summary["router/entropy/0"] + 2 * math.log(2, 6)) / 3)
    names = ("aux_loss", "max_vio", "entropy", "dead_experts", "selected_mass")
    assert [key for key in summary if key.count("/") == 2] == [
        f"router/{name}/{label}" for label in ("0", "3", "encoder.3") for name in names
    ]
    assert summary["router/dead_experts/0"] == 0
    assert summary["router/dead_experts/3"] == 4
    assert {type(value) for value in summary.values()} == {float}


def test_summary_without_the_layers() -> None:
    layers = {"0": balanced(), "1": collapsed()}
    whole = metrics.summarise(layers)
    short = metrics.summarise(layers, per_layer=False)
    assert set(short) == {
        f"router/{name}" for name in ("aux_loss", "max_vio", "max_vio_max", "entropy", "dead_experts", "selected_mass")
    }
    assert short == {key: whole[key] for key in short}


@pytest.mark.parametrize("layers", [{}, {"0": nothing()}], ids=["no routers", "no tokens"])
def test_nothing_is_said_of_nothing(layers: dict[str, LayerStatistics]) -> None:
    assert metrics.summarise(layers) == {}
    assert metrics.summarise_drift({}) == {}


def test_no_drift_from_itself() -> None:
    routing = observed(torch.randn(7, 5).softmax(-1), 3)
    drift = metrics.drift(routing, routing)
    assert metrics.drift_kl(drift).item() == 0
    assert metrics.topk_overlap(drift).item() == 1


def test_kl_of_nearly_equal_routings_is_not_negative() -> None:
    logits = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    changed = logits + 1e-6 * torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
    base, now = logits.softmax(-1), changed.softmax(-1)
    assert (kl_divergence(base, now) < 0).any(), "rounding shows"
    for one, other in zip(base.split(1), now.split(1), strict=True):
        assert metrics.drift_kl(metrics.drift(observed(one, 2), observed(other, 2))).item() >= 0


def test_overlap_does_not_look_at_the_order_of_choices() -> None:
    base = observed(torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]]), 2)
    now = observed(torch.tensor([[0.3, 0.4, 0.2, 0.1], [0.1, 0.4, 0.2, 0.3]]), 2)
    drift = metrics.drift(base, now)
    assert metrics.topk_overlap(drift).item() == 0.75
    first = 0.4 * math.log(4 / 3) + 0.3 * math.log(3 / 4)
    second = 0.4 * math.log(4) + 0.3 * math.log(3 / 4) + 0.1 * math.log(1 / 3)
    assert metrics.drift_kl(drift).item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_kl_is_from_the_base_model() -> None:
    base = observed(torch.tensor([[0.5, 0.5]], dtype=torch.float64), 1)
    now = observed(torch.tensor([[0.75, 0.25]], dtype=torch.float64), 1)
    there = metrics.drift_kl(metrics.drift(base, now)).item()
    back = metrics.drift_kl(metrics.drift(now, base)).item()
    assert there == pytest.approx(0.5 * math.log(4 / 3))
    assert back == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@given(split_routings())
def test_drift_adds_up_over_micro_batches(split: Any) -> None:
    whole, parts = split
    padding = ~whole.kept.unsqueeze(1)

    def drifted(routing: Any) -> Any:
        return observed(routing.probabilities.flip(1), routing.top_k_index.shape[1], routing.kept)

    base = observed(whole.probabilities.masked_fill(padding, math.nan), whole.top_k_index.shape[1])
    joined = metrics.drift(base, drifted(whole)).as_vector()
    added = reduce(add, (metrics.drift(part_of(whole, part.rows), drifted(part)) for part in parts)).as_vector()
    torch.testing.assert_close(added, joined, rtol=1e-12, atol=1e-12)
    tokens, kl, chosen, still_chosen = joined.tolist()
    assert tokens == whole.kept.sum()
    assert chosen == tokens * whole.top_k_index.shape[1]
    assert 0 <= still_chosen <= chosen
    # Gibbs' inequality, to rounding.
    assert kl >= -1e-12


def test_slots_that_were_not_recorded_do_not_overlap() -> None:
    routing = observed(torch.full((2, 4), 0.25), 2)
    routing.top_k_index = torch.tensor([[0, -1], [4, 3]])
    drift = metrics.drift(routing, routing)
    assert drift.chosen.item() == 2
    assert metrics.topk_overlap(drift).item() == 1


def test_drift_of_other_tokens_is_refused() -> None:
    long, short = (observed(torch.rand(tokens, 4).softmax(-1), 2) for tokens in (5, 1))
    with pytest.raises(AssertionError, match="of other tokens or routers"):
        metrics.drift(long, short)


def test_summary_of_drift() -> None:
    routing = observed(torch.rand(4, 5).softmax(-1), 2)
    same = metrics.drift(routing, routing)
    moved = DriftStatistics(*torch.tensor([4.0, 2.0, 8.0, 2.0], dtype=torch.float64).unbind())
    assert metrics.summarise_drift({"0": same, "1": moved}) == {
        "router/drift_kl": 0.25,
        "router/topk_overlap": 0.625,
        "router/drift_kl/0": 0.0,
        "router/topk_overlap/0": 1.0,
        "router/drift_kl/1": 0.5,
        "router/topk_overlap/1": 0.25,
    }
    assert set(metrics.summarise_drift({"0": same}, per_layer=False)) == {"router/drift_kl", "router/topk_overlap"}


def test_drift_never_waits_for_the_device_and_has_no_graph() -> None:
    """Reading a value of a meta tensor is an error, as there is none."""
    probabilities = torch.empty(6, 4, device="meta", requires_grad=True).softmax(-1)
    routing = observed(probabilities, 2, torch.empty(6, dtype=torch.bool, device="meta"))
    vector = metrics.drift(routing, routing).as_vector()
    assert (vector.device.type, vector.requires_grad) == ("meta", False)
