"""Products with frozen matrices and their deltas, and the gradient of the deltas, one expert after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import assert_output_close
from trl_moe_ext.kernels import trained_products
from trl_moe_ext.kernels.trained_products import outer_like, summed_mm

# Rows of the chosen experts 0, 2, 3 and 5 of six: none at all, one, and more than a bucket of a bfloat16 product.
CHOSEN, COUNTS, TAIL = (0, 2, 3, 5), (0, 70, 1, 9), 4
DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]


class Rows:
    """Rows of four experts, of which some are rows of nobody; stacks as memory has them or transposed."""

    def __init__(self, dtype: torch.dtype, delta_dtype: torch.dtype, is_transposed: bool) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.inputs, self.grad = self.draw(sum(COUNTS) + TAIL, 24), self.draw(sum(COUNTS) + TAIL, 40)
        self.inputs, self.grad = self.inputs.to(dtype), self.grad.to(dtype)
        stacks = self.draw(6, 24, 40), self.draw(4, 24, 40) * 0.3
        self.weight, self.delta = (s.mT.contiguous().mT if is_transposed else s for s in stacks)
        self.weight, self.delta = self.weight.to(dtype), self.delta.to(delta_dtype)
        self.experts = torch.tensor(CHOSEN)
        self.ends = torch.tensor(COUNTS).cumsum(0).to(torch.int32)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def each(self, rows: Tensor) -> list[Tensor]:
        return [*rows.double()[: sum(COUNTS)].split(COUNTS)]


@pytest.fixture(params=[False, True], ids=["in order", "transposed"])
def rows(request, dtypes) -> Rows:
    return Rows(*dtypes, request.param)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_row_meets_the_rounded_sum_of_its_expert(rows, dtypes):
    found = summed_mm(rows.inputs, rows.weight, rows.delta, rows.experts, rows.ends)
    sums = (rows.weight[rows.experts] + rows.delta).to(dtypes[0]).double()
    expected = torch.cat([x @ total for x, total in zip(rows.each(rows.inputs), sums, strict=True)])
    assert found.dtype == dtypes[0]
    assert_output_close(found[: sum(COUNTS)], expected, dtypes[0])
    assert not found[sum(COUNTS) :].any()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_gradient_has_the_dtype_and_strides_of_the_delta(rows, dtypes):
    found = outer_like(rows.inputs, rows.grad, rows.ends, rows.delta)
    pairs = zip(rows.each(rows.inputs), rows.each(rows.grad), strict=True)
    assert (found.dtype, found.stride()) == (dtypes[1], rows.delta.stride())
    assert_output_close(found.to(dtypes[0]), torch.stack([x.T @ g for x, g in pairs]), dtypes[0])
    assert not found[0].any()  # nobody came


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=str)
def test_operators_are_what_a_compiler_takes_them_for(rows, dtypes):
    # Without the tests of autograd, which these operators leave to their caller.
    tests = ("test_schema", "test_faketensor")
    arguments = (rows.inputs, rows.weight, rows.delta, rows.experts, rows.ends)
    torch.library.opcheck(trained_products._summed_op, arguments, test_utils=tests)
    arguments = (rows.inputs, rows.grad, rows.ends, rows.delta)
    torch.library.opcheck(trained_products._outer_op, arguments, test_utils=tests)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_form_of_other_devices_gives_the_same(rows, dtypes):
    """A GPU forms all sums at once."""
    sums = trained_products._sums(rows.weight, rows.delta, rows.experts)
    expected = trained_products.grouped_mm(rows.inputs, sums, rows.ends)
    found = summed_mm(rows.inputs, rows.weight, rows.delta, rows.experts, rows.ends)
    assert sums.stride() == rows.delta.stride()
    assert_output_close(found, expected, dtypes[0])
