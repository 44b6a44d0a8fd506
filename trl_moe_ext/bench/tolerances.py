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
    """``||actual - expected|| / ||expected||`` in float64.

    Raises:
        ValueError: the shapes differ, or the expected tensor is zero, against which nothing would be tested.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    actual, expected = actual.detach().double(), expected.detach().double()
    norm = expected.norm()
    if not norm > 0:
        raise ValueError("the expected tensor is zero, or not a number: nothing would be tested")
    return float((actual - expected).norm() / norm)
