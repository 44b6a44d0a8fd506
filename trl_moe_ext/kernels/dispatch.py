"""Which row goes to which expert: sort the routed rows by expert, and bring results back to their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """A permutation of the S = T*K (token, slot) pairs that groups them by expert.

    Attributes:
        order: ``(S,)`` int64, the flat pair ``t*K + k`` that stands in each row.
        position: ``(S,)`` int64, the inverse: the row of each flat pair.
        offsets: ``(E,)`` int32, the end of each expert's rows. Rows from ``offsets[-1]`` on belong to no expert.
        top_k: K.
    """

    order: Tensor
    position: Tensor
    offsets: Tensor
    top_k: int

    @property
    def counts(self) -> Tensor:
        """``(E,)`` int64, the number of each expert's rows."""
        return self.offsets.diff(prepend=self.offsets.new_zeros(1)).to(torch.int64)

    @property
    def tokens(self) -> Tensor:
        """``(S,)`` the token of each row."""
        return torch.div(self.order, self.top_k, rounding_mode="floor")

    def gather(self, hidden_states: Tensor) -> Tensor:
        """``(T, n)`` tokens to ``(S, n)`` rows."""
        return hidden_states[self.tokens]

    def rows(self, per_slot: Tensor) -> Tensor:
        """``(T, K)`` values to ``(S, 1)``: each row's own."""
        return per_slot.reshape(-1)[self.order].unsqueeze(-1)

    def to_slots(self, rows: Tensor) -> Tensor:
        """``(S, n)`` rows to ``(T, K, n)``: each token's K results in the order of its slots."""
        return rows[self.position].view(-1, self.top_k, rows.shape[-1])


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> Dispatch:
    """Group the routed rows by expert, without a host synchronisation.

    Args:
        top_k_index: ``(T, K)`` integers. An index of `num_experts` or more marks a slot that no expert of this rank
            serves (expert parallelism): its row sorts behind all experts, costs nothing and receives zero.
        num_experts: E.
    """
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel(), device=order.device)
    ends = torch.arange(num_experts, device=order.device, dtype=expert.dtype)
    offsets = torch.searchsorted(expert, ends, right=True).to(torch.int32)
    return Dispatch(order, position, offsets, top_k_index.shape[-1])


def combine(rows: Tensor, top_k_weights: Tensor, dispatch: Dispatch) -> Tensor:
    """The weighted sum of each token's K results, as transformers computes it: no atomics, one rounding.

    Args:
        rows: ``(S, H)`` results in the order of the rows.
        top_k_weights: ``(T, K)`` routing weights, in their own dtype.

    Returns:
        ``(T, H)`` in the promoted dtype of both.
    """
    return (dispatch.to_slots(rows) * top_k_weights.unsqueeze(-1)).sum(dim=1)


def rows_of_experts(rows_per_expert: Sequence[int], device: torch.device) -> Dispatch:
    """The dispatch of rows that are sorted by expert already: `rows_per_expert` belong to each."""
    rows = torch.arange(sum(rows_per_expert), device=device)
    ends = torch.tensor(list(accumulate(rows_per_expert)), dtype=torch.int32, device=device)
    return Dispatch(rows, rows, ends, 1)
