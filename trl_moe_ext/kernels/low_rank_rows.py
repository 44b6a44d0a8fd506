"""The products of a low-rank update with sorted rows: rows to rank-sized ones, these added to rows, and gradients.

On a GPU with Triton, rows of experts without an update are not read; elsewhere their factors of zero do the same.
Rows from ``offsets[-1]`` on belong to no expert and may hold anything, NaN included, before and after.

Legend: S routed rows sorted by expert, E groups of them (experts, or runs of experts, see `selected`), n columns,
r rank.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from trl_moe_ext.kernels import on_triton
from trl_moe_ext.kernels.grouped import grouped_mm, grouped_outer

__all__ = ["add_low_rank", "outer", "project"]

# A tile's factors have to fit into the shared memory of a multiprocessor: rank 128 in bfloat16.
_LARGEST_RANK_BYTES = 256


def project(rows: Tensor, factor: Tensor, offsets: Tensor, has_update: Tensor | None = None) -> Tensor:
    """``(S, r)``: each group's rows times its factor; zero for groups without an update.

    Args:
        rows: ``(S, n)``.
        factor: ``(E, n, r)`` in their dtype, any strides.
        offsets: ``(E,)`` int32, the end of each group's rows.
        has_update: ``(E,)`` bool; the factors of the others have to be zero. None for all.
    """
    if has_update is not None and (triton := _triton(factor.shape[2], rows)):
        u: Tensor = triton.project(rows, factor, offsets, has_update)
        return u
    return grouped_mm(rows, factor, offsets, zero_tail=False)


def add_low_rank(rows: Tensor, u: Tensor, factor: Tensor, offsets: Tensor, has_update: Tensor | None = None) -> None:
    """Add ``u_e factor_e`` to the rows of each group e, in place.

    Args:
        rows: ``(S, n)``.
        u: ``(S, r)`` in their dtype.
        factor: ``(E, r, n)`` likewise, any strides.
        offsets, has_update: see `project`.
    """
    if triton := _triton(factor.shape[1], rows, u):
        triton.add_low_rank(rows, u, factor, offsets, has_update)
    else:
        rows += grouped_mm(u, factor, offsets)


def outer(left: Tensor, right: Tensor, offsets: Tensor, has_update: Tensor | None = None) -> Tensor:
    """``(E, m, n)``: for each group ``left_e^T right_e``; anything for groups without an update.

    Args:
        left: ``(S, m)``.
        right: ``(S, n)`` in the same dtype; m or n is a rank.
        offsets, has_update: see `project`.
    """
    if has_update is not None and (triton := _triton(min(left.shape[1], right.shape[1]), left, right)):
        products: Tensor = triton.outer(left, right, offsets, has_update)
        return products
    return grouped_outer(left, right, offsets)


def _triton(rank: int, *rows: Tensor) -> ModuleType | None:
    """The module of Triton kernels, if it can take this rank and these rows, with columns side by side."""
    if not all(on_triton.takes(each) and each.stride(-1) == 1 for each in rows):
        return None
    if rank * rows[0].element_size() > _LARGEST_RANK_BYTES:
        return None
    from trl_moe_ext.kernels import triton_low_rank

    return triton_low_rank
