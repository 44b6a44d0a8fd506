"""Sorting by expert is a permutation that can be undone, whatever the routing."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_moe_ext.kernels.dispatch import combine, sort_by_expert


@st.composite
def routings(draw):
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    beyond = draw(st.integers(0, 2))  # slots that belong to other ranks
    return torch.rand(tokens, experts + beyond, generator=generator).topk(top_k, -1).indices, experts


@given(routings())
def test_rows_are_grouped_by_expert(routing):
    index, experts = routing
    dispatch = sort_by_expert(index, experts)
    flat = index.reshape(-1)
    start = 0
    for expert, end in enumerate(dispatch.offsets.tolist()):
        assert (flat[dispatch.order[start:end]] == expert).all()
        assert end - start == (flat == expert).sum()
        start = end
    assert (flat[dispatch.order[start:]] >= experts).all()


@given(routings())
def test_gather_and_to_slots_undo_each_other(routing):
    index, experts = routing
    tokens = torch.arange(index.shape[0], dtype=torch.float32).unsqueeze(1)
    dispatch = sort_by_expert(index, experts)
    slots = dispatch.to_slots(dispatch.gather(tokens))
    assert slots.shape == (*index.shape, 1)
    assert (slots == tokens.unsqueeze(1)).all()


@given(routings())
def test_combine_weighs_each_slot_with_its_own_weight(routing):
    index, experts = routing
    dispatch = sort_by_expert(index, experts)
    weights = torch.rand(index.shape)
    # Each row carries the number of its expert: the sum must be that of weight times expert over the slots.
    rows = index.reshape(-1)[dispatch.order].float().unsqueeze(1)
    torch.testing.assert_close(combine(rows, weights, dispatch)[:, 0], (weights * index).sum(1))


def test_ties_keep_the_order_of_the_tokens():
    """A stable sort makes the rows of an expert independent of the machine."""
    dispatch = sort_by_expert(torch.tensor([[1], [0], [1], [0]]), 2)
    assert dispatch.order.tolist() == [1, 3, 0, 2]
