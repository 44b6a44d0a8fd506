"""Routes of packed tokens: one tensor for all routers, and what tokens that samples share keep of them.

A shared prefix is forwarded once, but every sample has routes of its own for it, which the generator may have chosen
in batches of different shapes. A token is replayed by a router only if all samples that recorded it agree.

Legend: T tokens, R routers, K the largest top_k of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_moe_ext.router.record import NOT_RECORDED, RoutingRecord
from trl_moe_ext.router.routers import Router

__all__ = ["RouteSlots", "merge_routes"]


class RouteSlots:
    """The way from a record to one tensor and back.

    Args:
        routers: of the model that is trained.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = tuple(routers)
        self.shape = len(self._routers), max((router.top_k for router in self._routers), default=0)
        #: ``(R,)``: how many slots each router fills.
        self.top_k = torch.tensor([router.top_k for router in self._routers])

    def blank(self, num_tokens: int) -> Tensor:
        """``(T, R, K)`` int16, nothing recorded."""
        return torch.full((num_tokens, *self.shape), NOT_RECORDED, dtype=torch.int16)

    def encode(self, record: RoutingRecord) -> Tensor:
        """``(T, R, K)`` int16; routers that the record does not know are blank.

        Raises:
            ConfigError: the record is of another model.
        """
        record.check_routers(self._routers)
        slots = self.blank(len(record))
        for at, router in enumerate(self._routers):
            if router.label in record.experts:
                slots[:, at, : router.top_k] = record.experts[router.label]
        return slots

    def decode(self, slots: Tensor) -> RoutingRecord:
        """The record of ``(T, R, K)``; the inverse of `encode`."""
        experts = {router.label: slots[:, at, : router.top_k] for at, router in enumerate(self._routers)}
        return RoutingRecord.of(experts, {router.label: router.num_experts for router in self._routers})

    def is_recorded(self, slots: Tensor) -> Tensor:
        """``(T, R)`` bool: the routers all of whose slots are filled for a token."""
        return (slots > NOT_RECORDED).sum(-1) == self.top_k


def merge_routes(
    slots: RouteSlots, num_nodes: int, samples: Sequence[tuple[Sequence[int], Tensor]]
) -> tuple[Tensor, Tensor]:
    """The routes of tokens that several samples share.

    Args:
        slots: of the model.
        num_nodes: how many tokens there are, N.
        samples: of each sample which token stands at each of its T places, no token twice, and ``(T, R, K)`` routes.

    Returns:
        ``(N, R, K)`` int16, blank where samples do not agree on the experts, in whatever order; and ``(N,)`` bool, the
        tokens where some router of some samples does not.
    """
    merged = slots.blank(num_nodes)
    conflicts = torch.zeros(num_nodes, slots.shape[0], dtype=torch.bool)
    for nodes, routes in samples:
        at = torch.tensor(nodes)
        known, new = slots.is_recorded(merged[at]), slots.is_recorded(routes)
        differs = (merged[at].sort(-1).values != routes.sort(-1).values).any(-1)
        conflicts[at] |= known & new & differs
        merged[at] = torch.where((new & ~known).unsqueeze(-1), routes, merged[at])
    merged[conflicts] = NOT_RECORDED
    return merged, conflicts.any(-1)
