"""Record what the routers of a model choose, as observer of a `RouterTrace`."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from trl_moe_ext.router.record import NOT_RECORDED, RoutingRecord
from trl_moe_ext.router.trace import Routing

__all__ = ["RoutingRecorder"]


class RoutingRecorder:
    """Keeps the chosen experts of every forward until they are taken.

    recorder = RoutingRecorder()
    with RouterTrace(find_routers(model), recorder):
        model(**batch)
    record = recorder.take()
    """

    def __init__(self) -> None:
        self._chosen: dict[str, list[Tensor]] = defaultdict(list)
        self._num_experts: dict[str, int] = {}

    def __call__(self, routing: Routing) -> None:
        """Keep one routing; tokens that do not count are not recorded."""
        index = routing.top_k_index
        if routing.kept is not None:
            index = torch.where(routing.kept.unsqueeze(1), index, NOT_RECORDED)
        self._chosen[routing.router.label].append(index)
        self._num_experts[routing.router.label] = routing.router.num_experts

    def take(self) -> RoutingRecord:
        """The routes of all forwards since the last call, one after the other, on the CPU; they are forgotten here.

        Raises:
            ConfigError: the routers saw different tokens.
        """
        joined = {label: torch.cat(parts).cpu() for label, parts in self._chosen.items()}
        self._chosen.clear()
        return RoutingRecord.of(joined, self._num_experts)
