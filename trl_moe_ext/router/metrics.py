"""Numbers that tell how a router is doing, from its statistics, under the names by which they are logged.

Every function of statistics is NaN for a router that saw no token; `summarise` and `summarise_drift` leave such a
router out. Legend: T tokens of a forward, K top_k, E experts of the router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from trl_moe_ext.router.losses import kl_divergence
from trl_moe_ext.router.statistics import DriftStatistics, LayerStatistics, Sums, as_sum, count_tokens
from trl_moe_ext.router.tokens import is_expert, only_kept

if TYPE_CHECKING:
    from trl_moe_ext.router.trace import Routing

__all__ = [
    "aux_loss",
    "dead_experts",
    "drift",
    "drift_kl",
    "load_share",
    "max_vio",
    "normalised_entropy",
    "selected_mass",
    "summarise",
    "summarise_drift",
    "topk_overlap",
]

Statistics = TypeVar("Statistics", bound=Sums)


def aux_loss(layer: LayerStatistics) -> Tensor:
    """``()``: the load balancing loss of `losses.load_balancing` over all the tokens: K if the routing is balanced."""
    return layer.counts.numel() * (layer.counts * layer.probabilities).sum() / layer.tokens.square()


def load_share(layer: LayerStatistics) -> Tensor:
    """``(E,)``: the share of the choices that went to each expert; sums to one."""
    return layer.counts / layer.counts.sum()


def max_vio(layer: LayerStatistics) -> Tensor:
    """``()``: MaxVio = (largest load - mean load) / mean load, arXiv 2408.15664 (loss-free balancing).

    0 if every expert has the same load, E / K - 1 if all tokens choose the same K.
    """
    return layer.counts.max() / layer.counts.mean() - 1


def normalised_entropy(layer: LayerStatistics) -> Tensor:
    """``()``: mean over the tokens of H(p) / log E: 1 if the router cannot tell the experts apart, 0 if it is sure."""
    return layer.entropy / layer.tokens


def dead_experts(layer: LayerStatistics) -> Tensor:
    """``()``: how many experts no token chose."""
    return torch.where(layer.tokens > 0, (layer.counts == 0).sum(), torch.nan)


def selected_mass(layer: LayerStatistics) -> Tensor:
    """``()``: mean over the tokens of the probability that the chosen experts have together."""
    return layer.mass / layer.tokens


def drift(base: Routing, now: Routing) -> DriftStatistics:
    """How far a routing is from that of the model without its adapters, for the same tokens; without a graph.

    Args:
        base: the routing of the adapter-disabled model.
        now: the routing of the adapted one; its ``kept`` tells which tokens count.
    """
    found, expected = now.logits.shape, base.logits.shape
    assert found == expected, f"the routings are of other tokens or routers: logits {tuple(found)}, {tuple(expected)}"
    kl = kl_divergence(base.probabilities.detach(), now.probabilities.detach())
    chosen = is_expert(base.top_k_index, expected[-1])
    stays = (base.top_k_index.unsqueeze(2) == now.top_k_index.unsqueeze(1)).any(2)
    return DriftStatistics(
        tokens=as_sum(count_tokens(now)),
        # A divergence is not negative; between rows that are nearly equal, rounding can make it so.
        kl=as_sum(only_kept(kl.clamp_min(0.0), now.kept).sum()),
        chosen=as_sum(only_kept(chosen, now.kept).sum()),
        still_chosen=as_sum(only_kept(chosen & stays, now.kept).sum()),
    )


def drift_kl(layer: DriftStatistics) -> Tensor:
    """``()``: mean over the tokens of KL(base || now), in nats."""
    return layer.kl / layer.tokens


def topk_overlap(layer: DriftStatistics) -> Tensor:
    """``()``: the share of the base model's choices that are chosen now as well, in whatever order."""
    return layer.still_chosen / layer.chosen


def summarise(layers: Mapping[str, LayerStatistics], *, per_layer: bool = True) -> dict[str, float]:
    """All that is logged of some routers; waits for the device once.

    Args:
        layers: label of the router -> its statistics.
        per_layer: also the values of each router, with its label behind the name: ``router/max_vio/3``.

    Returns:
        ``router/aux_loss``, ``router/max_vio``, ``router/entropy`` and ``router/selected_mass`` (means over the
        routers), ``router/max_vio_max`` (the worst router) and ``router/dead_experts`` (all routers together); empty
        if no router saw a token.
    """
    table = _table(
        layers,
        {
            "aux_loss": aux_loss,
            "max_vio": max_vio,
            "entropy": normalised_entropy,
            "dead_experts": dead_experts,
            "selected_mass": selected_mass,
        },
    )
    if not table:
        return {}
    summary = _means(table)
    summary["router/max_vio_max"] = max(row["max_vio"] for row in table.values())
    summary["router/dead_experts"] = sum(row["dead_experts"] for row in table.values())
    return summary | (_by_layer(table) if per_layer else {})


def summarise_drift(layers: Mapping[str, DriftStatistics], *, per_layer: bool = True) -> dict[str, float]:
    """``router/drift_kl`` and ``router/topk_overlap``, means over the routers; else as `summarise`."""
    table = _table(layers, {"drift_kl": drift_kl, "topk_overlap": topk_overlap})
    if not table:
        return {}
    return _means(table) | (_by_layer(table) if per_layer else {})


def _table(
    layers: Mapping[str, Statistics], metrics: Mapping[str, Callable[[Statistics], Tensor]]
) -> dict[str, dict[str, float]]:
    """Label -> metric -> value, for the routers that saw a token."""
    if not layers:
        return {}
    # Layers may be on several devices; those of the first one wait once, at `tolist`.
    device = next(iter(layers.values())).tokens.device
    rows = []
    for layer in layers.values():
        rows.append(torch.stack([layer.tokens, *(metric(layer) for metric in metrics.values())]).to(device))
    values: list[list[float]] = torch.stack(rows).tolist()
    return {label: dict(zip(metrics, row[1:])) for label, row in zip(layers, values) if row[0] > 0}


def _means(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    names = next(iter(table.values()))
    return {f"router/{name}": sum(row[name] for row in table.values()) / len(table) for name in names}


def _by_layer(table: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"router/{name}/{label}": value for label, row in table.items() for name, value in row.items()}
