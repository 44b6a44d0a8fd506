"""The load of each layer in numbers, at the start and at the end."""

from __future__ import annotations

from dataclasses import dataclass

from trl_moe_ext.reporting.numbers import figure
from trl_moe_ext.router.history import RouterHistory, relative_load

__all__ = ["LayerRow", "layer_table"]


@dataclass(frozen=True)
class LayerRow:
    """A layer at the last record: its busiest expert, the share of that one, and how many experts had no token."""

    label: str
    experts: int
    first_max_vio: str
    last_max_vio: str
    busiest: int
    share: str
    unused: int


def layer_table(history: RouterHistory) -> list[LayerRow]:
    """A row for each layer of the last record."""
    return [_row(history, label) for label in history.labels if label in history.records[-1].layers]


def _row(history: RouterHistory, label: str) -> LayerRow:
    shares = history.records[-1].layers[label]
    busiest = max(range(len(shares)), key=shares.__getitem__)
    return LayerRow(
        label=label,
        experts=len(shares),
        first_max_vio=figure(history.max_vio(label)[0][1]),
        last_max_vio=figure(max(relative_load(shares)) - 1),
        busiest=busiest,
        share=f"{shares[busiest]:.1%}",
        unused=sum(share == 0 for share in shares),
    )
