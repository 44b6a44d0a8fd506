"""Experts with about the same number of rows side by side, so that what is small runs for all of them at once.

Legend: T tokens, K top_k, S = T*K routed rows sorted by expert, E experts; a group has G experts of m rows each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trl_moe_ext.kernels.buckets import rounded
from trl_moe_ext.kernels.dispatch import Dispatch

import os
# Rows of a group: enough to make one operation of many experts, few enough to stay in the caches of a CPU.
_ROWS = int(os.environ.get("ROWS", "768"))


class ExpertGroup(NamedTuple):
    """G experts with m rows each. Rows in excess of an expert's own must count for nothing.

    Attributes:
        experts: their indices.
        index: the same, ``(G,)`` int64.
        sizes: the rows of each that its large products take: its own, rounded up to a bucket; at most m.
        rows: where the group's ``G*m`` rows are among those of all groups.
        pairs: ``(G*m,)`` the flat (token, slot) pair ``t*K + k`` of each row; any one's for a row in excess.
        tokens: ``(G*m,)`` its token.
        is_own: ``(G*m, 1)`` bool, False for a row in excess.
    """

    experts: list[int]
    index: Tensor
    sizes: list[int]
    rows: slice
    pairs: Tensor
    tokens: Tensor
    is_own: Tensor

    def by_expert(self, rows: Tensor) -> Tensor:
        """``(G*m, n)`` to ``(G, m, n)``."""
        return rows.view(len(self.experts), -1, rows.shape[-1])


def bound_of_rows(rows: int) -> int:
    """How many rows the groups of any routing of `rows` rows have at most."""
    return 2 * rows


def group_experts(dispatch: Dispatch, dtype: torch.dtype) -> list[ExpertGroup]:
    """The experts that have rows, in groups; the same ones whenever they are asked for.

    Args:
        dispatch: the routing.
        dtype: of the large products. In bfloat16 numbers of rows are rounded up, see `buckets`; otherwise not.
    """
    own = dispatch.offsets.diff(prepend=dispatch.offsets.new_zeros(1)).to(torch.int64)
    first_row = dispatch.offsets - own
    size_of = rounded if dtype == torch.bfloat16 else int
    groups, start = [], 0
    for members in _split([(size_of(n), n, expert) for expert, n in enumerate(own.tolist()) if n]):
        sizes, _, experts = (list(column) for column in zip(*members, strict=True))
        index, local = torch.tensor(experts), torch.arange(sizes[-1])
        row = (first_row[index, None] + local).clamp_(max=len(dispatch.order) - 1).view(-1)
        pairs = dispatch.order[row]
        tokens = pairs.div(dispatch.top_k, rounding_mode="floor")
        is_own = (local < own[index, None]).view(-1, 1)
        rows = slice(start, start := start + len(row))
        groups.append(ExpertGroup(experts, index, sizes, rows, pairs, tokens, is_own))
    return groups


def _split(experts: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """(size, own rows, expert) in ascending order, as many at a time as pad little to the size of the last."""
    group: list[tuple[int, int, int]] = []
    for expert in sorted(experts):
        padded, own = (len(group) + 1) * expert[0], sum(member[1] for member in group) + expert[1]
        if group and padded > min(_ROWS, own + own // 4 + 16, 2 * own):
            yield group
            group = []
        group.append(expert)
    if group:
        yield group
