"""How often a router chooses other experts than a record says, as sums: they add up over micro-batches and steps.

Some 10 % of the choices of two engines differ, and 94 % of the tokens in at least one layer (arXiv 2510.11370).

Legend: T tokens of a forward, K top_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trl_moe_ext.router.record import NOT_RECORDED
from trl_moe_ext.router.statistics import as_sum

__all__ = ["ANY", "RoutingMismatch", "differing_tokens", "recorded_tokens"]


# In the place of a label: any layer. No module has an empty name.
ANY = ""


def recorded_tokens(recorded: Tensor) -> Tensor:
    """``(T,)`` bool: the tokens of a record ``(T, K)`` all of whose slots were recorded."""
    return (recorded > NOT_RECORDED).all(1)


def differing_tokens(recorded: Tensor, top_k_index: Tensor) -> Tensor:
    """``(T,)`` bool: the tokens whose experts are others than the recorded ones, in whatever order.

    Args:
        recorded: ``(T, K)`` integers; tokens that were not recorded differ from nothing.
        top_k_index: ``(T, K)`` int64, the live choice.
    """
    is_other = (recorded.sort(1).values != top_k_index.sort(1).values).any(1)
    return is_other & recorded_tokens(recorded)


@dataclass(frozen=True)
class RoutingMismatch:
    """Sums over the recorded tokens of some forwards; each ``()``, float64.

    Attributes:
        tokens: label of the router -> how many tokens were recorded; under `ANY` those recorded in at least one layer.
        differing: label of the router -> how many of them were sent to other experts; under `ANY` those sent to other
            experts in at least one layer.
    """

    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    differing: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, recorded: Mapping[str, Tensor], differing: Mapping[str, Tensor]) -> RoutingMismatch:
        """The sums of one forward, without waiting for the device.

        Args:
            recorded: label of the router -> ``(T,)`` bool, of `recorded_tokens`.
            differing: the same labels -> ``(T,)`` bool, of `differing_tokens`.
        """
        return cls(_sums(recorded), _sums(differing))

    def __add__(self, other: RoutingMismatch) -> RoutingMismatch:
        return RoutingMismatch(_added(self.tokens, other.tokens), _added(self.differing, other.differing))

    def metrics(self, *, per_layer: bool = True) -> dict[str, float]:
        """What is logged: shares of the recorded tokens; waits for the device once.

        Args:
            per_layer: also those of each router, with its label behind the name: ``router/replay_mismatch/3``.

        Returns:
            ``router/replay_mismatch`` (mean over the routers) and ``router/replay_mismatch_any`` (in any layer); empty
            if no token was recorded.
        """
        if not self.tokens:
            return {}
        rows = torch.stack([torch.stack([self.tokens[label], self.differing[label]]) for label in self.tokens])
        shares = {label: row[1] / row[0] for label, row in zip(self.tokens, rows.tolist()) if row[0]}
        if not shares:
            return {}
        name, any_share = "router/replay_mismatch", shares.pop(ANY)
        found = {name: sum(shares.values()) / len(shares), f"{name}_any": any_share}
        return found | ({f"{name}/{label}": share for label, share in shares.items()} if per_layer else {})


def _sums(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not tokens:
        return {}
    # Layers may be on several devices.
    device = next(iter(tokens.values())).device
    here = {label: each.to(device) for label, each in tokens.items()}
    here[ANY] = torch.stack([*here.values()]).any(0)
    return {label: as_sum(each.sum()) for label, each in here.items()}


def _added(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums by label; a router that is on one side only keeps its own."""
    both = {label: mine[label] + theirs[label] for label in mine if label in theirs}
    return {**mine, **theirs, **both}
