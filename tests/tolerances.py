"""Comparisons that fail a test; how close is equal is told by the table that `trl-moe bench --check` goes by."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_moe_ext.bench.tolerances import RELATIVE_ERROR, relative_error

__all__ = ["RELATIVE_ERROR", "assert_gradient_close", "assert_output_close", "relative_error"]


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
