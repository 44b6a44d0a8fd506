"""Routes of samples that share a prefix: a token keeps those that all agree on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.batches.routes import RouteSlots, merge_routes
from trl_moe_ext.router.record import RoutingRecord

# Two routers with different numbers of slots.
ROUTERS = [SimpleNamespace(label="0", top_k=2, num_experts=4), SimpleNamespace(label="1", top_k=1, num_experts=300)]
SLOTS = RouteSlots(ROUTERS)  # type: ignore[arg-type]


def record(first: list[list[int]], second: list[int]) -> RoutingRecord:
    experts = {"0": torch.tensor(first), "1": torch.tensor(second).unsqueeze(1)}
    return RoutingRecord.of(experts, {"0": 4, "1": 300})


def test_there_and_back():
    given = record([[0, 3], [2, 1], [-1, -1]], [299, -1, 0])
    found = SLOTS.decode(SLOTS.encode(given))
    assert found.experts.keys() == given.experts.keys()
    assert all(torch.equal(found.experts[label], index) for label, index in given.experts.items())


def test_a_router_without_a_record_is_blank():
    slots = SLOTS.encode(RoutingRecord.of({"1": torch.tensor([[7]])}, {"1": 300}))
    assert slots.tolist() == [[[-1, -1], [7, -1]]]
    assert SLOTS.is_recorded(slots).tolist() == [[False, True]]


def test_routes_of_another_model_are_refused():
    with pytest.raises(ConfigError, match="another model"):
        SLOTS.encode(RoutingRecord.of({"5": torch.tensor([[7]])}, {"5": 300}))


def test_samples_agree_or_a_token_is_left_to_the_router():
    """Two samples share nodes 0, 1, 2: the same experts in another order; other experts; recorded by one only."""
    first = SLOTS.encode(record([[0, 3], [0, 1], [-1, -1], [1, 2]], [5, 6, 7, 8]))
    second = SLOTS.encode(record([[3, 0], [0, 2], [2, 3], [3, 1]], [5, 6, 9, 8]))
    merged, conflicts = merge_routes(SLOTS, 5, [([0, 1, 2, 3], first), ([0, 1, 2, 4], second)])
    assert merged[:, 0].tolist() == [[0, 3], [-1, -1], [2, 3], [1, 2], [3, 1]]
    assert merged[:, 1, 0].tolist() == [5, 6, -1, 8, 8]
    assert conflicts.tolist() == [False, True, True, False, False]


def test_a_conflict_stays_one_whoever_comes_later():
    """The third sample agrees with the first: what the second recorded is not forgotten."""
    routes = [SLOTS.encode(record([experts], [1])) for experts in ([0, 1], [2, 3], [0, 1])]
    merged, conflicts = merge_routes(SLOTS, 1, [([0], each) for each in routes])
    assert merged[0, 0].tolist() == [-1, -1]
    assert merged[0, 1, 0] == 1
    assert conflicts.tolist() == [True]
