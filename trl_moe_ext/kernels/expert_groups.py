"""Experts with about the same number of rows side by side, so that what is small runs for all of them at once.

Legend: T tokens, K top_k, S = T*K routed rows sorted by expert, E experts; a group has G experts of m rows each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from trl_moe_ext.kernels.buckets import coarsely_rounded, rounded
from trl_moe_ext.kernels.dispatch import Dispatch

# Rows of a group: enough to make one operation of many experts, few enough to stay in the caches of a CPU.
_ROWS = 512
# Rows of an expert from which its rank-sized products are faster in bfloat16 than in float32.
_MANY = 16
# An expert: its size, its own rows, its index.
_Sized = tuple[int, int, int]


class ExpertGroup(NamedTuple):
    """G experts with m rows each. Rows in excess of an expert's own must count for nothing.

    Attributes:
        experts: their indices.
        chosen: the same, ``(G,)`` int64.
        sizes: the rows of each that its large products take: its own, rounded up to a bucket; at most m.
        rows: where the group's ``G*m`` rows are among those of all groups.
        pairs: ``(G*m,)`` the flat (token, slot) pair ``t*K + k`` of each row; any one's for a row in excess.
        tokens: ``(G*m,)`` its token.
        is_own: ``(G*m, 1)`` bool, False for a row in excess.
        small: the dtype of rank-sized products.
    """

    experts: list[int]
    chosen: Tensor
    sizes: list[int]
    rows: slice
    pairs: Tensor
    tokens: Tensor
    is_own: Tensor
    small: torch.dtype

    def by_expert(self, rows: Tensor) -> Tensor:
        """``(G*m, n)`` to ``(G, m, n)``."""
        return rows.view(len(self.experts), -1, rows.shape[-1])

    def expert_of_rows(self) -> Tensor:
        """``(G*m,)`` the expert of each row."""
        return self.chosen.repeat_interleave(len(self.pairs) // len(self.experts))


def bound_of_rows(rows: int) -> int:
    """How many rows the groups of any routing of `rows` rows have at most."""
    return 2 * rows


def group_experts(
    dispatch: Dispatch, dtype: torch.dtype, kinds: Sequence[Hashable] | None = None
) -> list[ExpertGroup]:
    """The experts that have rows, in groups; the same ones whenever they are asked for.

    Args:
        dispatch: the routing.
        dtype: of the large products. In bfloat16 and float16 numbers of rows are rounded up, see `buckets`.
        kinds: one for each expert: the experts of a group are of one kind. None if all are.
    """
    own = dispatch.counts
    first_row = dispatch.offsets - own
    wide = torch.promote_types(dtype, torch.float32)
    size_of, m_of = (int, int) if dtype == wide else (rounded, coarsely_rounded)
    of_kind: dict[Hashable, list[_Sized]] = {}
    for sized in sorted((size_of(n), n, expert) for expert, n in enumerate(own.tolist()) if n):
        of_kind.setdefault(None if kinds is None else kinds[sized[2]], []).append(sized)
    groups, start = [], 0
    for members, m in chain.from_iterable(_split(alike, m_of) for alike in of_kind.values()):
        sizes, _, experts = (list(column) for column in zip(*members, strict=True))
        chosen, local = torch.tensor(experts), torch.arange(m)
        row = (first_row[chosen, None] + local).clamp_(max=len(dispatch.order) - 1).view(-1)
        pairs = dispatch.order[row]
        tokens = pairs.div(dispatch.top_k, rounding_mode="floor")
        is_own = (local < own[chosen, None]).view(-1, 1)
        rows = slice(start, start := start + len(row))
        small = dtype if m >= _MANY and len(experts) == _full(m) else wide
        groups.append(ExpertGroup(experts, chosen, sizes, rows, pairs, tokens, is_own, small))
    return groups


def idle_experts(dispatch: Dispatch) -> Tensor:
    """The indices of the experts without rows."""
    return (dispatch.counts == 0).nonzero().view(-1)


def _split(experts: list[_Sized], m_of: Callable[[int], int]) -> Iterator[tuple[list[_Sized], int]]:
    """The experts of each group and its m, from the largest size down.

    Args:
        experts: in ascending order; used up.
        m_of: from the largest size to m.
    """
    while experts:
        m = m_of(experts[-1][0])
        group = experts[-_full(m) :]
        # Where neighbours differ much, fewer go together.
        while len(group) > 1 and len(group) * m > 2 * sum(own for _, own, _ in group):
            group = group[len(group) // 2 :]
        del experts[-len(group) :]
        yield group, m


def _full(m: int) -> int:
    """Experts of m rows in a group. One number for each m, so that few shapes of batched products are compiled."""
    return max(1, _ROWS // m)
