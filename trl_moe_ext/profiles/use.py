"""How much each expert behind one router was used, as sums that add up over batches.

Nothing here waits for the device. Legend: T tokens of a forward, K top_k, E experts with weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trl_moe_ext.router.statistics import Sums, as_sum, count_tokens
from trl_moe_ext.router.tokens import count_choices, is_expert
from trl_moe_ext.router.trace import Routing

__all__ = ["UseStatistics"]


@dataclass
class UseStatistics(Sums):
    """What fell on each expert of one router.

    Attributes:
        counts: ``(E,)``, tokens that chose each expert.
        weights: ``(E,)``, sum over the tokens of the weight of each expert, zero where it was not chosen.
    """

    counts: Tensor
    weights: Tensor

    @classmethod
    def of(cls, routing: Routing) -> Self:
        """The statistics of one forward. A family that shows no weights is read by its probabilities."""
        E = routing.router.num_with_weights
        index = routing.top_k_index
        counted = is_expert(index, E)
        if routing.kept is not None:
            counted = counted & routing.kept.unsqueeze(1)
        weights = routing.top_k_weights
        if weights is None:
            weights = routing.probabilities.gather(1, torch.where(counted, index, 0))
        # Not by a product: a NaN in a padded row must not get through. What does not count has a bin of its own.
        weights = as_sum(torch.where(counted, weights.detach(), 0)).flatten()
        bins = torch.where(counted, index, E).flatten()
        return cls(
            tokens=as_sum(count_tokens(routing)),
            counts=as_sum(count_choices(index, E, routing.kept)),
            weights=torch.zeros(E + 1, dtype=weights.dtype, device=bins.device).scatter_add_(0, bins, weights)[:E],
        )
