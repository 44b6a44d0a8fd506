"""A measure of the routers over a run, of each layer and of their mean, from either of the places that know it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_moe_ext.router.history import RouterHistory

__all__ = ["Curve", "LayerCurves"]

Curve = list[tuple[int, float]]  # steps and values


@dataclass(frozen=True)
class LayerCurves:
    """`layers` is empty where only the mean was logged, and `mean` where nothing was."""

    layers: Mapping[str, Curve]
    mean: Curve

    @classmethod
    def max_vio(cls, history: RouterHistory) -> LayerCurves:
        """MaxVio from the load of every expert."""
        layers = {label: curve for label in history.labels if (curve := history.max_vio(label))}
        by_step: dict[int, list[float]] = {}
        for curve in layers.values():
            for step, value in curve:
                by_step.setdefault(step, []).append(value)
        return cls(layers, [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())])

    @classmethod
    def from_log(cls, rows: Iterable[Mapping[str, Any]], key: str) -> LayerCurves:
        """A measure from `TrainerState.log_history`; values that are not finite are left out.

        Args:
            rows: of the log.
            key: of the mean, such as ``router/max_vio``; those of the layers have their label behind it,
                ``router/max_vio/3``.
        """
        layers: dict[str, Curve] = {}
        mean: Curve = []
        for row in rows:
            for name, value in row.items():
                if not isinstance(value, int | float) or not math.isfinite(value):
                    continue
                if name == key:
                    mean.append((row["step"], value))
                elif name.startswith(f"{key}/"):
                    layers.setdefault(name.removeprefix(f"{key}/"), []).append((row["step"], value))
        return cls(layers, mean)

    @property
    def highest(self) -> str | None:
        """Label of the layer that ends highest; None where there are no layers."""
        return max(self.layers, key=lambda label: self.layers[label][-1][1], default=None)
