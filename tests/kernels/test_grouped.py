"""Grouped products equal one product for each expert, at every number of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tolerances import assert_output_close
from trl_moe_ext.kernels.grouped import grouped_mm, grouped_outer

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
counts_of_rows = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 90)), min_size=1, max_size=7)


def experts_of(counts, tail):
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    return offsets, sum(counts) + tail


@given(counts=counts_of_rows, tail=st.integers(0, 3), dtype=st.sampled_from(DTYPES), transposed=st.booleans())
def test_grouped_mm_multiplies_each_expert_by_its_own_matrix(counts, tail, dtype, transposed):
    offsets, rows = experts_of(counts, tail)
    x = torch.randn(rows, 6).to(dtype)
    weight = torch.randn(len(counts), 6, 4).to(dtype)
    weight = weight.mT.contiguous().mT if transposed else weight
    out = grouped_mm(x, weight, offsets)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            assert_output_close(out[start:end], x[start:end].double() @ weight[expert].double(), dtype)
        start = end
    assert (out[start:] == 0).all(), "rows of no expert must be zero"


@given(
    counts=counts_of_rows,
    tail=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    columns=st.sampled_from([(3, 8), (8, 3)]),
)
def test_grouped_outer_sums_over_the_rows_of_one_expert_only(counts, tail, dtype, columns):
    offsets, rows = experts_of(counts, tail)
    left, right = torch.randn(rows, columns[0]).to(dtype), torch.randn(rows, columns[1]).to(dtype)
    out = grouped_outer(left, right, offsets)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            assert_output_close(out[expert], left[start:end].double().T @ right[start:end].double(), dtype)
        else:
            assert (out[expert] == 0).all()
        start = end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_products_are_sound_custom_operators(dtype):
    offsets = torch.tensor([2, 2, 7], dtype=torch.int32)
    x, weight = torch.randn(8, 6).to(dtype), torch.randn(3, 6, 4).to(dtype)
    torch.library.opcheck(torch.ops.trl_moe_ext.grouped_rows, (x, weight, offsets))
    torch.library.opcheck(torch.ops.trl_moe_ext.grouped_outer, (x, x, offsets))
