"""Which layers of a config a tiny model keeps: the fewest that show every kind of layer the config has."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from trl_moe_ext.experts.census.rules import FEWEST_LAYERS

LAYER_COUNT = re.compile(r"(num|n)_(hidden_|decoder_|encoder_)?layers|(en|de)coder_layers|depth")


@dataclass(frozen=True)
class LayerPlan:
    """The layers kept.

    Attributes:
        default: layers of the config.
        kept: indices of the kept ones, rising.
        overrides: for each kept layer that has any, the attributes that the config sets for that layer alone.
    """

    default: int
    kept: tuple[int, ...]
    overrides: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return len(self.kept)

    def cut(self, values: Sequence[Any]) -> list[Any]:
        """`values`, one for each layer, of the kept layers."""
        return [values[index] for index in self.kept]

    def positions(self, indices: Sequence[int]) -> list[int]:
        """Layer numbers in the tiny model of the layers `indices`; the last layer where none is kept."""
        kept = [position for position, index in enumerate(self.kept) if index in indices]
        return kept or ([self.count - 1] if indices else [])

    def is_per_layer(self, value: Any) -> bool:
        """Whether `value` has an entry for each layer."""
        return isinstance(value, list | tuple) and len(value) == self.default and not self.is_indices(value)

    def is_indices(self, value: Any) -> bool:
        """Whether `value` is a list of layer numbers."""
        if not isinstance(value, list | tuple) or not all(type(entry) is int for entry in value):
            return False
        return list(value) == sorted(set(value)) and all(0 <= entry < self.default for entry in value)


def plan_layers(config: PreTrainedConfig) -> LayerPlan:
    """The fewest layers, two at least, in which every value of every per-layer list of `config` occurs."""
    counts = [value for name, value in vars(config).items() if LAYER_COUNT.fullmatch(name) and isinstance(value, int)]
    # Some families compute the number of layers from a list of their kinds.
    default = max(counts, default=getattr(config, "num_hidden_layers", None) or 0)
    spec = vars(config).get("_heterogeneity_spec")
    overrides: dict[int, dict[str, Any]] = dict(spec.per_layer_overrides) if spec else {}
    everything = LayerPlan(default, tuple(range(default)))
    special = [repr(sorted(overrides.get(index, ()))) for index in range(default)]
    columns: list[list[Hashable]] = [[*special]]
    for value in vars(config).values():
        if everything.is_indices(value):
            columns.append([index in value for index in range(default)])
        elif everything.is_per_layer(value):
            # With the overrides: a sparse layer of its own size beside a sparse layer of the usual one.
            columns.append([(repr(entry), keys) for entry, keys in zip(value, special)])
    kept = _cover(columns, default)
    return LayerPlan(default, kept, {kept.index(index): overrides[index] for index in kept if index in overrides})


def _cover(columns: list[list[Hashable]], default: int) -> tuple[int, ...]:
    """Layers, chosen greedily from the first, that together show every value of every column."""
    missing = {(number, value) for number, column in enumerate(columns) for value in column}
    kept: set[int] = set()
    while missing:
        shown = [{(number, column[index]) for number, column in enumerate(columns)} for index in range(default)]
        best = max(range(default), key=lambda index: (len(shown[index] & missing), -index))
        kept.add(best)
        missing -= shown[best]
    # From the end: the first layers of a model are the odd ones, the last are as most are.
    spare = (index for index in reversed(range(default)) if index not in kept)
    while len(kept) < min(FEWEST_LAYERS, default):
        kept.add(next(spare))
    return tuple(sorted(kept))
