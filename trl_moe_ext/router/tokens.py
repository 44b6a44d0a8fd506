"""Tokens that count: padding is taken out before anything is summed.

Legend: T tokens of a forward, K top_k, E experts of the router.
"""

from __future__ import annotations

import torch
from torch import Tensor


def only_kept(values: Tensor, kept: Tensor | None) -> Tensor:
    """``values`` with zeros in the rows that do not count.

    A product with the mask would let an infinity or a NaN of a padded row through, in the value or in the gradient.

    Args:
        values: ``(T, ...)``.
        kept: ``(T,)`` bool, or None if every row counts.
    """
    if kept is None:
        return values
    return torch.where(kept.view(-1, *(1,) * (values.dim() - 1)), values, 0)


def is_expert(top_k_index: Tensor, num_experts: int) -> Tensor:
    """``(T, K)`` bool: False for slots that name no expert, as -1 (not recorded) and E (on another device) do."""
    return (top_k_index >= 0) & (top_k_index < num_experts)


def count_choices(top_k_index: Tensor, num_experts: int, kept: Tensor | None = None) -> Tensor:
    """How many tokens chose each expert, ``(E,)`` int64, without waiting for the device.

    Args:
        top_k_index: ``(T, K)`` int64, chosen experts.
        num_experts: E.
        kept: ``(T,)`` bool, or None if every token counts.
    """
    counted = is_expert(top_k_index, num_experts)
    if kept is not None:
        counted = counted & kept.unsqueeze(1)
    # What does not count falls into a bin of its own. `bincount` would wait for the device to learn its length.
    bins = torch.where(counted, top_k_index, num_experts).flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=bins.device)
    return counts.scatter_add_(0, bins, torch.ones_like(bins))[:num_experts]
