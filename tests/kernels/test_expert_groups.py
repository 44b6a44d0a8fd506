"""What runs side by side on a CPU: every row once, few shapes, and little in excess."""

from __future__ import annotations

import pytest
import torch

from trl_moe_ext.kernels.buckets import coarsely_rounded, rounded
from trl_moe_ext.kernels.dispatch import sort_by_expert
from trl_moe_ext.kernels.expert_groups import bound_of_rows, group_experts, idle_experts

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def routing(kind, T=200, K=4, E=24):
    torch.manual_seed(0)
    scores = torch.randn(T, E)
    if kind == "skewed":
        scores = scores + torch.linspace(0, 6, E)
    if kind == "one expert":
        return torch.full((T, 1), 3), E
    if kind == "sentinels":
        return (scores.topk(K).indices + 3), E
    if kind == "few tokens":
        scores = scores[:2]
    return scores.topk(K).indices, E


KINDS = pytest.mark.parametrize("kind", ["even", "skewed", "one expert", "sentinels", "few tokens"])


@KINDS
@DTYPES
def test_each_row_of_an_expert_is_there_once(kind, dtype):
    index, experts = routing(kind)
    flat = index.reshape(-1)
    groups = group_experts(sort_by_expert(index, experts), dtype)
    seen = []
    for group in groups:
        m = len(group.pairs) // len(group.experts)
        own = group.pairs[group.is_own.view(-1)]
        assert flat[own].tolist() == [e for e in group.experts for _ in range(int((flat == e).sum()))]
        assert torch.equal(group.tokens, group.pairs // index.shape[1])
        # The large product of an expert takes all its own rows, which stand in front.
        for expert, size, is_own in zip(group.experts, group.sizes, group.by_expert(group.is_own), strict=True):
            count = int((flat == expert).sum())
            assert count <= size <= m
            assert is_own.view(-1).tolist() == [True] * count + [False] * (m - count)
        seen += own.tolist()
    assert sorted(seen) == torch.where(flat < experts)[0].tolist()


@KINDS
@DTYPES
def test_groups_stand_one_behind_the_other_within_the_bound(kind, dtype):
    index, experts = routing(kind)
    groups = group_experts(sort_by_expert(index, experts), dtype)
    assert [group.rows.start for group in groups] == [0, *(group.rows.stop for group in groups[:-1])]
    assert groups[-1].rows.stop <= bound_of_rows(index.numel())


@KINDS
@DTYPES
def test_experts_of_a_group_are_of_one_kind(kind, dtype):
    index, experts = routing(kind)
    dispatch, kinds = sort_by_expert(index, experts), [(expert % 3 == 0, expert % 2) for expert in range(experts)]
    groups = group_experts(dispatch, dtype, kinds)
    assert all(len({kinds[expert] for expert in group.experts}) == 1 for group in groups)
    everywhere = sorted(expert for group in group_experts(dispatch, dtype) for expert in group.experts)
    assert sorted(expert for group in groups for expert in group.experts) == everywhere
    assert groups[-1].rows.stop <= bound_of_rows(index.numel())


@KINDS
def test_experts_are_in_a_group_or_idle(kind):
    index, experts = routing(kind)
    dispatch = sort_by_expert(index, experts)
    busy = [expert for group in group_experts(dispatch, torch.bfloat16) for expert in group.experts]
    assert sorted(busy + idle_experts(dispatch).tolist()) == list(range(experts))


def test_a_product_in_bfloat16_has_few_shapes():
    """One number of experts for each number of rows, over many routings: each shape is compiled."""
    shapes = set()
    for seed in range(30):
        index = (torch.randn(512, 64, generator=torch.Generator().manual_seed(seed)) + torch.arange(64) / 30).topk(8)
        for group in group_experts(sort_by_expert(index.indices, 64), torch.bfloat16):
            if group.small == torch.bfloat16:
                shapes.add((len(group.experts), len(group.pairs) // len(group.experts)))
    assert len(shapes) == len({m for _, m in shapes}) <= 8


def test_rounding_adds_little():
    for rows in range(1, 5000):
        assert rows <= rounded(rows) <= rows + max(3, min(rows // 4, 15))
        assert rounded(rows) <= coarsely_rounded(rounded(rows)) < 2 * rows or rows <= 2
    expected = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 7: 8, 12: 12, 13: 16, 17: 24, 25: 32, 300: 384}
    assert {rows: coarsely_rounded(rows) for rows in expected} == expected
