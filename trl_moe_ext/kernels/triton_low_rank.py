"""Triton kernels for the products of a low-rank update, with sums in float32; `low_rank_rows` says what each computes.

Rows of experts without an update cost nothing. Imported only where Triton is installed.

Legend: S routed rows sorted by expert, E groups of them, n columns, r rank.
"""

# Triton compiles these functions: their arguments are pointers, scalars and constants, and annotations mean constants.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trl_moe_ext.kernels.triton_rows import device_of

__all__ = ["add_low_rank", "outer", "project"]

_TILE_ROWS, _TILE_COLUMNS = 64, 128  # to which a product is added
_FEW_ROWS, _SOME_COLUMNS = 32, 64  # that are summed over at once


def project(rows: Tensor, factor: Tensor, offsets: Tensor, has_update: Tensor) -> Tensor:
    num_groups, columns, rank = factor.shape
    u = rows.new_empty(rows.shape[0], rank)
    tiles = triton.cdiv(rows.shape[0], _FEW_ROWS) + num_groups
    with device_of(rows):
        _project_kernel[(tiles,)](
            rows, factor, offsets, has_update, u, num_groups, rank, columns, rows.stride(0), *factor.stride(),
            triton.next_power_of_2(num_groups), _at_least_16(rank), _FEW_ROWS, _SOME_COLUMNS,
        )  # fmt: skip
    return u


def add_low_rank(rows: Tensor, u: Tensor, factor: Tensor, offsets: Tensor, has_update: Tensor | None = None) -> None:
    num_groups, rank, columns = factor.shape
    # Tiles start at a group's first row: each group has at most one that is not full.
    tiles = triton.cdiv(rows.shape[0], _TILE_ROWS) + num_groups
    with device_of(rows):
        _add_low_rank_kernel[(tiles, triton.cdiv(columns, _TILE_COLUMNS))](
            rows, u, factor, offsets, has_update, num_groups, rank, columns, rows.stride(0), u.stride(0),
            *factor.stride(), has_update is not None, triton.next_power_of_2(num_groups), _at_least_16(rank),
            _TILE_ROWS, _TILE_COLUMNS,
        )  # fmt: skip


def outer(left: Tensor, right: Tensor, offsets: Tensor, has_update: Tensor) -> Tensor:
    height, width, num_groups = left.shape[1], right.shape[1], offsets.shape[0]
    out = left.new_empty(num_groups, height, width)
    high, wide = min(128, _at_least_16(height)), min(128, _at_least_16(width))
    with device_of(left):
        _outer_kernel[(num_groups, triton.cdiv(height, high), triton.cdiv(width, wide))](
            left, right, offsets, has_update, out, height, width, left.stride(0), right.stride(0),
            high, wide, _FEW_ROWS,
        )  # fmt: skip
    return out


def _at_least_16(size: int) -> int:
    """What a product of tiles asks for, a power of two."""
    return max(16, int(triton.next_power_of_2(size)))


@triton.jit
def _place(tile, offsets, num_groups, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """The group of a tile of rows, `num_groups` if there is none; its first row, and the end of the group's."""
    index = tl.arange(0, GROUPS)
    known = index < num_groups
    ends = tl.load(offsets + index, known, 0)
    starts = tl.load(offsets + index - 1, known & (index > 0), 0)
    tiles = tl.where(known, (ends - starts + ROWS - 1) // ROWS, 0)
    after = tl.cumsum(tiles, 0)
    group = tl.sum(tl.where(known & (after <= tile), 1, 0), 0)
    is_it = index == group
    first = tl.sum(tl.where(is_it, starts + (tile - after + tiles) * ROWS, 0), 0)
    return group, first, tl.sum(tl.where(is_it, ends, 0), 0)


@triton.jit
def _project_kernel(
    rows, factor, offsets, has_update, u, num_groups, rank, columns, row_stride, group_stride, column_stride,
    rank_stride, GROUPS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group, first, end = _place(tl.program_id(0), offsets, num_groups, GROUPS, ROWS)
    if group < num_groups:
        row, k = first + tl.arange(0, ROWS), tl.arange(0, RANK)
        in_rows, in_rank, row64 = (row < end)[:, None], (k < rank)[None, :], row.to(tl.int64)[:, None]
        total = tl.zeros((ROWS, RANK), tl.float32)
        if tl.load(has_update + group) != 0:
            factor += group.to(tl.int64) * group_stride
            for start in range(0, columns, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                inside = column < columns
                left = tl.load(rows + row64 * row_stride + column[None, :], in_rows & inside[None, :], 0.0)
                right = tl.load(
                    factor + column[:, None] * column_stride + k[None, :] * rank_stride, inside[:, None] & in_rank, 0.0
                )
                total += tl.dot(left, right, input_precision="ieee")
        tl.store(u + row64 * rank + k[None, :], total.to(u.dtype.element_ty), in_rows & in_rank)


@triton.jit
def _add_low_rank_kernel(
    rows, u, factor, offsets, has_update, num_groups, rank, columns, row_stride, u_stride, group_stride,
    rank_stride, column_stride, SOME: tl.constexpr, GROUPS: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    group, first, end = _place(tl.program_id(0), offsets, num_groups, GROUPS, ROWS)
    is_updated = group < num_groups
    if SOME:
        is_updated = is_updated & (tl.load(has_update + group, is_updated, 0) != 0)
    if is_updated:
        row, k = first + tl.arange(0, ROWS), tl.arange(0, RANK)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        in_rows, in_columns, in_rank = (row < end)[:, None], (column < columns)[None, :], k < rank
        row64 = row.to(tl.int64)[:, None]
        left = tl.load(u + row64 * u_stride + k[None, :], in_rows & in_rank[None, :], 0.0)
        factor += group.to(tl.int64) * group_stride
        right = tl.load(
            factor + k[:, None] * rank_stride + column[None, :] * column_stride, in_rank[:, None] & in_columns, 0.0
        )
        there = rows + row64 * row_stride + column[None, :]
        update = tl.dot(left, right, input_precision="ieee")
        total = tl.load(there, in_rows & in_columns, 0.0).to(tl.float32) + update
        tl.store(there, total.to(rows.dtype.element_ty), in_rows & in_columns)


@triton.jit
def _outer_kernel(
    left, right, offsets, has_update, out, height, width, left_stride, right_stride,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    if tl.load(has_update + group) != 0:
        end = tl.load(offsets + group)
        start = tl.load(offsets + group - 1, group > 0, 0)
        i = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
        j = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
        in_height, in_width = (i < height)[None, :], (j < width)[None, :]
        total = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for first in range(start, end, ROWS):
            row = first + tl.arange(0, ROWS)
            in_rows, row64 = (row < end)[:, None], row.to(tl.int64)[:, None]
            one = tl.load(left + row64 * left_stride + i[None, :], in_rows & in_height, 0.0)
            other = tl.load(right + row64 * right_stride + j[None, :], in_rows & in_width, 0.0)
            total += tl.dot(tl.trans(one), other, input_precision="ieee")
        there = out + group.to(tl.int64) * height * width + i[:, None] * width + j[None, :]
        tl.store(there, total.to(out.dtype.element_ty), (i < height)[:, None] & in_width)
