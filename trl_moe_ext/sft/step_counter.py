"""The counts of a whole optimisation step: all micro-batches of gradient accumulation on all processes.

The balance of experts is a matter of the whole step (arXiv 2501.11873), but the loss of a micro-batch needs it at the
time of its own backward, when later micro-batches have not been routed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trl_moe_ext.router.routers import Router
from trl_moe_ext.router.statistics import LayerStatistics, added
from trl_moe_ext.router.trace import Routing
from trl_moe_ext.sft.objective import StepTotals
from trl_moe_ext.sft.processes import Reduce, sum_over_processes
from trl_moe_ext.sft.watch import kept_tokens

__all__ = ["StepCounter", "statistics_of"]


class StepCounter:
    """Totals of the current step, as far as they are known.

    A micro-batch that no `begin` has announced is a step of its own.

    Args:
        routers: of the model.
        reduce: the sum of a tensor over all processes.
    """

    def __init__(self, routers: Sequence[Router], reduce: Reduce) -> None:
        self._routers, self._reduce = routers, reduce
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._ahead: StepTotals | None = None
        self._tokens: float | None = None
        self._seen: dict[str, LayerStatistics] = {}

    def begin(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """A new step of these micro-batches."""
        self._batches, self._ahead, self._tokens = batches, None, None
        self._seen = {}

    @property
    def has_several(self) -> bool:
        """Whether the step has more than one micro-batch."""
        return len(self._batches) > 1

    @property
    def is_counted(self) -> bool:
        """Whether the whole step was counted ahead."""
        return self._ahead is not None

    def count_ahead(self, route: Callable[[Mapping[str, Any]], Iterable[Routing]]) -> None:
        """Count all micro-batches before the first backward.

        Args:
            route: the routing of a micro-batch, without a graph.
        """
        counted: dict[str, LayerStatistics] = {}
        for batch in self._batches:
            counted = added(counted, statistics_of(route(batch)))
        self._ahead = StepTotals.of(self._summed(counted))

    def add(self, statistics: Mapping[str, LayerStatistics]) -> None:
        """A micro-batch has been routed."""
        self._seen = added(self._seen, statistics) if self.has_several else dict(statistics)

    def totals(self, statistics: Mapping[str, LayerStatistics], inputs: Mapping[str, Any]) -> StepTotals:
        """Totals for the loss of the micro-batch that was added last. To be called in every process.

        Args:
            statistics: of this micro-batch.
            inputs: the micro-batch.
        """
        if self._ahead is not None:
            return self._ahead
        so_far = StepTotals.of(self._summed(self._seen))
        return self._scaled_up(so_far, statistics, inputs) if self.has_several else so_far

    def counts(self) -> dict[str, Tensor]:
        """Label -> ``(E,)`` how many tokens chose each expert in the micro-batches so far, on all processes."""
        return {label: layer.counts for label, layer in self._summed(self._seen).items()}

    def _scaled_up(
        self, so_far: StepTotals, statistics: Mapping[str, LayerStatistics], inputs: Mapping[str, Any]
    ) -> StepTotals:
        """Tokens of the whole step are known from the batches; what is not is where they will be sent."""
        if self._tokens is None:
            tokens = torch.tensor([float(sum(map(_num_tokens, self._batches)))], dtype=torch.float64)
            self._tokens = float(self._reduce(tokens))
        here = _num_tokens(inputs)
        tokens_of = {
            label: self._tokens * float(layer.tokens) / here if here else 0.0 for label, layer in statistics.items()
        }
        counts = {
            label: so_far.counts[label] * (tokens_of[label] / max(so_far.tokens[label], 1.0)) for label in tokens_of
        }
        return StepTotals(tokens_of, counts)

    def _summed(self, statistics: Mapping[str, LayerStatistics]) -> dict[str, LayerStatistics]:
        return sum_over_processes(statistics, self._routers, self._reduce)


def statistics_of(routings: Iterable[Routing]) -> dict[str, LayerStatistics]:
    """Label of the router -> its statistics; a router that is called several times in a forward has their sum."""
    found: dict[str, LayerStatistics] = {}
    for routing in routings:
        found = added(found, {routing.router.label: LayerStatistics.of(routing)})
    return found


def _num_tokens(inputs: Mapping[str, Any]) -> int:
    kept = kept_tokens(inputs)
    return int(kept.sum()) if kept is not None else int(inputs["input_ids"].numel())
