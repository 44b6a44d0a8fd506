"""What is logged of the routers: sums over the batches since the last log, reduced over all processes in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from trl_moe_ext.router.metrics import drift, load_share, summarise, summarise_drift
from trl_moe_ext.router.routers import Router
from trl_moe_ext.router.statistics import DriftStatistics, LayerStatistics, added, as_sum
from trl_moe_ext.router.trace import Routing
from trl_moe_ext.sft.processes import Reduce, drift_sizes, layer_sizes, sum_vectors

__all__ = ["RouterMeter"]


class RouterMeter:
    """Adds up what the routers do, for training or for evaluation.

    Args:
        routers: of the model, the same ones in every process.
        losses: names of the losses that are added to the training loss, the same ones in every process.
        per_layer: whether the values of each layer are logged too.
    """

    def __init__(self, routers: Sequence[Router], losses: Iterable[str], per_layer: bool) -> None:
        self._routers = routers
        self._names = sorted(losses)
        self._per_layer = per_layer
        self._layers: dict[str, LayerStatistics] = {}
        self._drift: dict[str, DriftStatistics] = {}
        self._losses: dict[str, Tensor] = {}

    def add(self, statistics: Mapping[str, LayerStatistics]) -> None:
        """Add a micro-batch."""
        self._layers = added(self._layers, statistics)

    def add_drift(self, base: Sequence[Routing], now: Sequence[Routing]) -> None:
        """Add how far a micro-batch is from the base routing."""
        for before, after in zip(base, now, strict=True):
            self._drift = added(self._drift, {after.router.label: drift(before, after)})

    def add_losses(self, shares: Mapping[str, Tensor]) -> None:
        """Add what the router losses contributed to the loss of a micro-batch."""
        for name, share in shares.items():
            part = as_sum(share.detach()).reshape(1)
            self._losses[name] = self._losses[name] + part if name in self._losses else part

    def collect(self, reduce: Reduce, steps: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        """What happened since the last call, and start anew. To be called in every process.

        Args:
            reduce: the sum of a tensor over all processes.
            steps: optimisation steps since the last call.

        Returns:
            What to log by name, and the load shares of each layer by its label; both empty if there was no batch.
        """
        layers, far, losses = self._summed(reduce)
        metrics = summarise(layers, per_layer=self._per_layer) | summarise_drift(far, per_layer=self._per_layer)
        if steps:
            metrics |= {f"router/loss/{name}": float(loss) / steps for name, loss in losses.items()}
        shares = {label: load_share(layer).tolist() for label, layer in layers.items() if layer.tokens > 0}
        self._layers, self._drift, self._losses = {}, {}, {}
        return metrics, shares

    def _summed(
        self, reduce: Reduce
    ) -> tuple[dict[str, LayerStatistics], dict[str, DriftStatistics], dict[str, Tensor]]:
        """What was added up in all processes."""
        labels = [router.label for router in self._routers]
        seen: list[Tensor | None] = [
            *(self._layers[label].as_vector() if label in self._layers else None for label in labels),
            *(self._drift[label].as_vector() if label in self._drift else None for label in labels),
            *map(self._losses.get, self._names),
        ]
        sizes = [*layer_sizes(self._routers), *drift_sizes(self._routers), *(1 for _ in self._names)]
        # One wait for the device here, and none in what is computed from the sums.
        vectors = iter(sum_vectors(seen, sizes, lambda packed: reduce(packed).cpu()))
        return (
            {label: LayerStatistics.from_vector(next(vectors)) for label in labels},
            {label: DriftStatistics.from_vector(next(vectors)) for label in labels},
            {name: next(vectors) for name in self._names},
        )
