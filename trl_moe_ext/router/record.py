"""Which experts each router sent each token to: what a generator records and a trainer replays.

Indices only, in the smallest integers that hold them: 4,096 tokens, 48 layers and 8 of 128 experts are 1.6 MB. A token
that a router was not seen to route, as the last one of a sequence is not, has -1 in its slots.

Legend: T tokens, K top_k, E experts of the router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.routers import Router

__all__ = ["NOT_RECORDED", "RoutingRecord"]

NOT_RECORDED = -1


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """The routes of some tokens; made by `of` and `blank`.

    Attributes:
        experts: label of the router -> ``(T, K)`` signed integers, the chosen experts, -1 where none was recorded.
        num_experts: label of the router -> E.
    """

    experts: Mapping[str, Tensor]
    num_experts: Mapping[str, int]

    @classmethod
    def of(cls, experts: Mapping[str, Tensor], num_experts: Mapping[str, int]) -> RoutingRecord:
        """The routes as they are given, checked, in the smallest integers that hold them.

        Args:
            experts: label of the router -> ``(T, K)`` integers from -1 to E - 1.
            num_experts: label of the router -> E; others are left out.

        Raises:
            ConfigError: a tensor is of another form, or the routers are of different tokens.
        """
        for label, index in experts.items():
            _check(label, index, num_experts.get(label, 0))
        lengths = {label: len(index) for label, index in experts.items()}
        if len({*lengths.values()}) > 1:
            raise ConfigError(
                f"the routers of one record should have routed the same tokens; found so many of each: {lengths}. "
                "Leave out those that see other tokens, such as those of an image tower"
            )
        small = {label: index.to(_smallest_integer(num_experts[label])) for label, index in experts.items()}
        return cls(small, {label: num_experts[label] for label in small})

    @classmethod
    def blank(cls, routers: Sequence[Router], num_tokens: int) -> RoutingRecord:
        """A record in which nothing is recorded: for padding, and for samples without routes."""
        rows = {r.label: torch.full((num_tokens, r.top_k), NOT_RECORDED, dtype=torch.int8) for r in routers}
        return cls.of(rows, {router.label: router.num_experts for router in routers})

    @staticmethod
    def cat(records: Sequence[RoutingRecord]) -> RoutingRecord:
        """The tokens of several records of the same model, one after the other.

        Raises:
            ConfigError: there is no record, or they are of different routers.
        """
        kinds = {tuple(record._kinds().items()) for record in records}
        if len(kinds) != 1:
            raise ConfigError(f"records of one kind can be put together; found {len(kinds)}: {sorted(kinds)}")
        first = records[0]
        joined = {label: torch.cat([record.experts[label] for record in records]) for label in first.experts}
        return replace(first, experts=joined)

    def __len__(self) -> int:
        return len(next(iter(self.experts.values()), ()))

    @property
    def nbytes(self) -> int:
        """Bytes of the indices."""
        return sum(index.nbytes for index in self.experts.values())

    def rows(self, tokens: Tensor | slice) -> RoutingRecord:
        """The routes of some of the tokens.

        Args:
            tokens: a slice, or ``(N,)`` int64, each token as often as wanted; -1 for a row without routes.
        """
        return replace(self, experts={label: _rows(index, tokens) for label, index in self.experts.items()})

    def to(self, device: torch.device | str) -> RoutingRecord:
        """The same on another device."""
        return replace(self, experts={label: index.to(device) for label, index in self.experts.items()})

    def check_routers(self, routers: Sequence[Router]) -> None:
        """Check that the record is of some of these routers.

        Raises:
            ConfigError: a router is missing, or has another number of experts.
        """
        known = {router.label: (router.top_k, router.num_experts) for router in routers}
        for label, kind in self._kinds().items():
            if known.get(label) != kind:
                there = "no router of that label" if label not in known else "{} of {}".format(*known[label])
                raise ConfigError(
                    f"the routes of {label!r}, which picks {kind[0]} of {kind[1]} experts, are of another model: this "
                    f"one has {there}. Record them with a model of the same config"
                )

    def _kinds(self) -> dict[str, tuple[int, int]]:
        """Label -> K and E."""
        return {label: (index.shape[1], self.num_experts[label]) for label, index in sorted(self.experts.items())}


def _check(label: str, index: Tensor, num_experts: int) -> None:
    is_integer = not index.is_floating_point() and index.dtype != torch.bool
    if num_experts < 1 or index.ndim != 2 or not is_integer:
        raise ConfigError(
            f"the routes of {label!r} should be integers (tokens, top_k) and its number of experts known; found "
            f"{index.dtype} {tuple(index.shape)} and {num_experts} experts"
        )
    low, high = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
    if low < NOT_RECORDED or high >= num_experts:
        raise ConfigError(
            f"the routes of {label!r} should be from -1 to {num_experts - 1}; found {low} to {high}. They are damaged "
            "or of another model"
        )


def _smallest_integer(num_experts: int) -> torch.dtype:
    """Signed, because of -1."""
    fitting = (dtype for dtype in (torch.int8, torch.int16, torch.int32) if num_experts <= torch.iinfo(dtype).max + 1)
    return next(fitting)


def _rows(index: Tensor, tokens: Tensor | slice) -> Tensor:
    if isinstance(tokens, slice):
        return index[tokens]
    with_blank = torch.cat([index, index.new_full((1, index.shape[1]), NOT_RECORDED)])
    return with_blank[torch.where(tokens < 0, len(index), tokens)]
