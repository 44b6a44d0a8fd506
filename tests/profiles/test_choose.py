"""The choice of experts and ranks, for any shares."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_moe_ext.profiles.choose import by_coverage, by_number, ranks_by_share

SHARES = st.lists(st.integers(0, 100), min_size=1, max_size=40).filter(any).map(lambda n: [x / sum(n) for x in n])


def test_by_hand():
    shares = [0.1, 0.4, 0.0, 0.3, 0.2]
    assert by_coverage(shares, 0.4) == (1,)
    assert by_coverage(shares, 0.41) == (1, 3)
    assert by_coverage(shares, 1.0) == (0, 1, 3, 4)
    assert by_number(shares, 2) == (1, 3)
    assert by_number(shares, 9) == (0, 1, 2, 3, 4)
    assert by_number([0.25] * 4, 2) == (0, 1), "of equals the lower index"
    assert ranks_by_share([0.7, 0.1, 0.1, 0.1], range(4), 8) == {0: 16, 1: 8, 2: 4, 3: 4}


@given(SHARES, st.floats(0.01, 1))
def test_the_fewest_experts_that_cover(shares, coverage):
    chosen = by_coverage(shares, coverage)
    assert list(chosen) == sorted({*chosen})
    gets = sum(shares[expert] for expert in chosen)
    assert gets >= coverage - 1e-8
    assert len(chosen) == 1 or gets - min(shares[expert] for expert in chosen) < coverage
    assert gets == pytest.approx(sum(sorted(shares)[-len(chosen) :])), "no other so many experts get more"


@given(SHARES, st.integers(1, 50))
def test_the_most_used_experts(shares, number):
    chosen = by_number(shares, number)
    assert len(chosen) == min(number, len(shares))
    left = [share for expert, share in enumerate(shares) if expert not in chosen]
    assert min(shares[expert] for expert in chosen) >= max(left, default=0)


@given(st.data(), SHARES, st.integers(1, 64))
def test_ranks_keep_the_budget_and_grow_with_use(data, shares, rank):
    experts = data.draw(st.lists(st.sampled_from(range(len(shares))), min_size=1, unique=True))
    ranks = ranks_by_share(shares, experts, rank)
    assert ranks.keys() == {*experts}
    assert sum(ranks.values()) <= rank * len(experts)
    assert {*ranks.values()} <= {max(1, rank // 4), max(1, rank // 2), rank, 2 * rank, 4 * rank}
    by_use = sorted(experts, key=lambda expert: shares[expert])
    for colder, hotter in itertools.pairwise(by_use):
        assert ranks[colder] <= ranks[hotter] or shares[colder] == shares[hotter]


@given(st.integers(1, 40), st.integers(1, 64))
def test_equal_use_gives_equal_ranks(experts, rank):
    assert {*ranks_by_share([1 / experts] * experts, range(experts), rank).values()} == {rank}
