"""What TRL's constructor is given in the place of what it would make, or what is made after it."""

from __future__ import annotations

import queue
from typing import Any

__all__ = ["NoWeightTransfer", "WorkerToCome"]


class NoWeightTransfer:
    """A `WeightTransferProtocol` that sends nothing: the adapter travels by the rollout worker."""

    def init_weight_transfer(self) -> None:
        """Nothing to set up."""

    def pause(self) -> None:
        """Generation goes on."""

    def send_weights(self, iterator: Any) -> None:
        """No weight of the base model ever changes."""

    def resume(self) -> None:
        """Nothing was paused."""

    def destroy(self) -> None:
        """Nothing was set up."""


class WorkerToCome:
    """The place of the rollout worker, which needs what TRL's constructor makes, until that has returned."""

    rollout_buffer: queue.Queue[Any] = queue.Queue()
    metrics_queue: queue.Queue[Any] = queue.Queue()
