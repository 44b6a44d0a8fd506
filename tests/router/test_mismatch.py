"""The share of tokens whose experts differ: by hand, in any order, and as sums that add up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_moe_ext.router.mismatch import ANY, RoutingMismatch, differing_tokens, recorded_tokens

# A token that is the same in another order, one that differs, one partly and one not recorded at all.
RECORDED = torch.tensor([[3, 1], [3, 1], [3, -1], [-1, -1]], dtype=torch.int8)
LIVE = torch.tensor([[1, 3], [1, 4], [0, 1], [0, 1]])


def test_tokens_differ_whatever_the_order_of_their_experts():
    assert recorded_tokens(RECORDED).tolist() == [True, True, False, False]
    assert differing_tokens(RECORDED, LIVE).tolist() == [False, True, False, False]


def test_metrics_by_hand():
    """Four tokens: the last is recorded in one layer only."""
    recorded = {"0": torch.tensor([1, 1, 1, 0]).bool(), "1": torch.tensor([1, 1, 1, 1]).bool()}
    differing = {"0": torch.tensor([1, 0, 0, 0]).bool(), "1": torch.tensor([1, 1, 0, 0]).bool()}
    mismatch = RoutingMismatch.of(recorded, differing)
    expected = {"router/replay_mismatch": (1 / 3 + 2 / 4) / 2, "router/replay_mismatch_any": 2 / 4}
    assert mismatch.metrics(per_layer=False) == pytest.approx(expected)
    expected |= {"router/replay_mismatch/0": 1 / 3, "router/replay_mismatch/1": 2 / 4}
    assert mismatch.metrics() == pytest.approx(expected)


def test_layers_without_a_recorded_token_are_left_out():
    nothing = torch.zeros(3, dtype=torch.bool)
    assert RoutingMismatch().metrics() == {}
    assert RoutingMismatch.of({"0": nothing}, {"0": nothing}).metrics() == {}
    found = RoutingMismatch.of({"0": nothing, "1": ~nothing}, {"0": nothing, "1": nothing}).metrics()
    assert found.keys() == {"router/replay_mismatch", "router/replay_mismatch_any", "router/replay_mismatch/1"}


@given(seed=st.integers(0, 2**31), cut=st.integers(0, 10))
def test_sums_of_parts_add_up(seed, cut):
    generator = torch.Generator().manual_seed(seed)
    recorded = {label: torch.rand(10, generator=generator) < 0.7 for label in "012"}
    differing = {label: each & (torch.rand(10, generator=generator) < 0.5) for label, each in recorded.items()}

    def of(rows: slice) -> RoutingMismatch:
        return RoutingMismatch.of(*({n: x[rows] for n, x in each.items()} for each in (recorded, differing)))

    whole = of(slice(None))
    assert (of(slice(cut)) + of(slice(cut, None))).metrics() == pytest.approx(whole.metrics())
    assert (RoutingMismatch() + whole + RoutingMismatch()).metrics() == whole.metrics()


def test_routers_that_are_on_one_side_only_keep_their_own():
    yes, no = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    found = RoutingMismatch.of({"0": yes}, {"0": yes}) + RoutingMismatch.of({"1": yes}, {"1": no})
    assert found.metrics() == {
        "router/replay_mismatch": 0.5,
        "router/replay_mismatch_any": 0.5,
        "router/replay_mismatch/0": 1.0,
        "router/replay_mismatch/1": 0.0,
    }
    assert float(found.tokens[ANY]) == 4
