"""The routes of the generator in a training step: replayed, or only compared with those of the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.batches.packing import routes_of
from trl_moe_ext.grpo.batches.routes import RouteSlots
from trl_moe_ext.router.mismatch import RoutingMismatch
from trl_moe_ext.router.record import RoutingRecord
from trl_moe_ext.router.replay import RoutingReplay
from trl_moe_ext.router.routers import Router

__all__ = ["StepReplay"]


class StepReplay:
    """Attached to the routers of a model for one micro-batch at a time.

    Args:
        routers: of the model, with its adapter.
        is_replayed: whether routes are replayed; else they are only compared.
        total: sums a tensor over all processes.

    Raises:
        ConfigError: routes are to be replayed, and the model has no router.
    """

    def __init__(self, routers: Sequence[Router], is_replayed: bool, total: Callable[[Tensor], Tensor]) -> None:
        self._routers = list(routers)
        if is_replayed and not self._routers:
            raise ConfigError("routing_replay has no effect, because the model has no router; leave it out")
        self.slots = RouteSlots(self._routers) if self._routers else None
        self._replay = RoutingReplay(self._routers, compare_only=not is_replayed)
        self._total = total
        self._mismatch = RoutingMismatch()

    def check(self, forward: Callable[[], object], num_tokens: int) -> None:
        """Run a forward of so many tokens, for what can't be replayed to be refused now and not in the first step.

        Raises:
            LayoutError: a router of the model can't be replayed.
        """
        with self._replay, torch.no_grad():
            self._replay.record = RoutingRecord.blank(self._routers, num_tokens)
            forward()
        self._replay.take_mismatch()

    @contextmanager
    def around(self, inputs: dict[str, Tensor], device: torch.device) -> Iterator[None]:
        """The routes of `inputs` hold for the forward and the backward inside; nothing happens if there are none."""
        record = routes_of(inputs, self.slots) if self.slots is not None else None
        if record is None:
            yield
            return
        with self._replay:
            self._replay.record = record.to(device)
            yield
        self._mismatch += self._everywhere(self._replay.take_mismatch())

    def take_metrics(self) -> dict[str, float]:
        """``router/replay_mismatch`` and ``router/replay_mismatch_any`` since the last call; maybe empty."""
        taken, self._mismatch = self._mismatch, RoutingMismatch()
        return taken.metrics(per_layer=False)

    def _everywhere(self, mismatch: RoutingMismatch) -> RoutingMismatch:
        labels = list(mismatch.tokens)
        if not labels:
            return mismatch
        pairs = [torch.stack([mismatch.tokens[label], mismatch.differing[label]]) for label in labels]
        tokens, differing = self._total(torch.stack(pairs)).unbind(1)
        return RoutingMismatch(dict(zip(labels, tokens)), dict(zip(labels, differing)))
