"""The router losses of a run, with their coefficients: from the routing of a micro-batch to what is added to its loss.

Legend: T tokens of a forward, E experts of the router.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.plugins import host
from trl_moe_ext.router.losses import LossInput, RouterLoss
from trl_moe_ext.router.statistics import LayerStatistics
from trl_moe_ext.router.trace import Routing

__all__ = ["RouterObjective", "StepTotals"]


@dataclass(frozen=True)
class StepTotals:
    """What the routers did in the whole optimisation step, on all processes.

    Attributes:
        tokens: label of the router -> tokens without padding.
        counts: label -> ``(E,)`` how many of them chose each expert.
    """

    tokens: Mapping[str, float]
    counts: Mapping[str, Tensor]

    @classmethod
    def of(cls, statistics: Mapping[str, LayerStatistics]) -> StepTotals:
        """The totals of statistics that are complete; waits for the device once."""
        if not statistics:
            return cls({}, {})
        tokens: list[float] = torch.stack([layer.tokens for layer in statistics.values()]).tolist()
        return cls(dict(zip(statistics, tokens)), {label: layer.counts for label, layer in statistics.items()})


class RouterObjective:
    """A weighted sum of router losses.

    Args:
        coefficients: name of a loss -> coefficient; those that are zero cost nothing.

    Attributes:
        needs_counts: whether a loss needs the counts of the whole step.
        needs_base: whether a loss needs the routing of the model without its adapters.
    """

    def __init__(self, coefficients: Mapping[str, float]) -> None:
        self._terms: list[tuple[RouterLoss, float]] = [
            (host().lookup("register_router_losses", name), coefficient)
            for name, coefficient in coefficients.items()
            if coefficient
        ]
        self.needs_counts = any(loss.needs_counts for loss, _ in self._terms)
        self.needs_base = any(loss.needs_base for loss, _ in self._terms)

    def __bool__(self) -> bool:
        return bool(self._terms)

    @property
    def names(self) -> list[str]:
        """Of the losses that count."""
        return [loss.name for loss, _ in self._terms]

    def shares(
        self, routings: Sequence[Routing], totals: StepTotals, base: Sequence[Routing] | None, layers: int
    ) -> dict[str, Tensor]:
        """Name of a loss -> this micro-batch's share of it, weighted, with a graph.

        Args:
            routings: of the routers that this micro-batch passed.
            totals: of the step that the micro-batch is part of.
            base: the same without the adapters, in the same order; None unless a loss needs it.
            layers: routers of the model; each loss is the mean over them.

        Raises:
            ConfigError: no router was passed, or no gradient flows from the routing, so that a loss would train
                nothing; or a loss has no meaning for these routers.
        """
        if not routings:
            raise ConfigError(
                f"{', '.join(self.names)}: no router was seen in this batch, so it would train nothing. Is the "
                "model called through another object than the trainer's? Leave the router losses out, or report this"
            )
        _refuse_without_graph(routings)
        self._refuse_without_logits(routings)
        inputs = [_input(routing, totals, None if base is None else base[i]) for i, routing in enumerate(routings)]
        return {
            loss.name: coefficient / layers * _sum(loss.function(routed) for routed in inputs)
            for loss, coefficient in self._terms
        }

    def _refuse_without_logits(self, routings: Sequence[Routing]) -> None:
        names = [loss.name for loss, _ in self._terms if loss.needs_logits]
        if names and (blind := next((r for r in routings if r.scores == "probabilities"), None)) is not None:
            raise ConfigError(
                f"{', '.join(names)}: no meaning for router {blind.router.name} ({type(blind.router.own).__name__}), "
                "which hands out probabilities and no logits. Leave it out of router_losses for this model"
            )


def _input(routing: Routing, totals: StepTotals, base: Routing | None) -> LossInput:
    label = routing.router.label
    return LossInput(
        logits=routing.logits,
        probabilities=routing.probabilities,
        kept=routing.kept,
        tokens_per_expert=totals.counts[label],
        num_tokens=totals.tokens[label],
        top_k=routing.top_k_index.shape[-1],
        base_probabilities=None if base is None else base.probabilities,
    )


def _sum(shares: Iterable[Tensor]) -> Tensor:
    first, *rest = shares
    for share in rest:
        first = first + share.to(first.device)  # layers of a model may be spread over devices
    return first


def _refuse_without_graph(routings: Sequence[Routing]) -> None:
    """The first layers have no graph where nothing before them is trained; where none has one, a loss is in vain."""
    if torch.is_grad_enabled() and not any(routing.logits.requires_grad for routing in routings):
        raise ConfigError(
            "no gradient flows to the routers' logits, so a router loss would train nothing. Either gradient "
            "checkpointing is reentrant, in which the forward runs without a graph: use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}. Or nothing is trained before the last router: "
            "train the router or earlier layers. Or leave the router losses out"
        )
