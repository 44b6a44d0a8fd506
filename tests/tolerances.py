"""How close is equal: one row for each dtype, compared by `relative_error`. Never loosened for a machine."""

from __future__ import annotations

import torch
from torch import Tensor

# dtype -> (outputs, gradients), each ||a - b|| / ||b|| against a float64 reference.
RELATIVE_ERROR = {
    torch.float64: (1e-12, 1e-12),  # the same formula in another order of summation
    torch.float32: (1e-5, 1e-4),  # 2^-24 times the square root of the longest sum, with a margin
    torch.bfloat16: (2e-2, 2e-2),  # 2^-9 for each rounding, a handful of roundings in a row
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; the expected tensor must not vanish."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = expected.norm()
    assert norm > 0, "the expected tensor is zero: nothing would be tested"
    return float((actual - expected).norm() / norm)


def assert_output_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Fail unless `actual` is as close to the reference as an output computed in `dtype` should be."""
    error = relative_error(actual, expected)
    assert error <= RELATIVE_ERROR[dtype][0], f"relative error {error:.2e} > {RELATIVE_ERROR[dtype][0]:.0e} ({dtype})"


def assert_gradient_close(actual: Tensor | None, expected: Tensor | None, dtype: torch.dtype, name: str) -> None:
    """Fail unless a gradient is there and as close to the reference as one computed in `dtype` should be."""
    assert actual is not None, f"{name} has no gradient"
    assert expected is not None, f"the reference of {name} has no gradient"
    error = relative_error(actual, expected)
    limit = RELATIVE_ERROR[dtype][1]
    assert error <= limit, f"gradient of {name}: relative error {error:.2e} > {limit:.0e} ({dtype})"
