"""Updates that exist for some experts of a stack only: which rows they are for, on any device.

Legend: E experts of the stack, G of them selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


class Runs(NamedTuple):
    """The experts of a stack as R runs: each selected expert alone, and all that stand between two of them together.

    A grouped product of compact factors takes one group a run, so that rows of the others need not be moved.

    Attributes:
        last: ``(R,)`` int64, the last expert of each run: ``offsets[last]`` are the ends of its rows.
        of_selected: ``(G,)`` int64, the run of each selected expert.
        is_alone: ``(R,)`` bool, whether a run is of one expert that has an update; the others have none.
    """

    last: Tensor
    of_selected: Tensor
    is_alone: Tensor

    def spread(self, factors: Tensor, onto: Tensor | None = None) -> Tensor:
        """``(G, m, n)`` factors of the selected experts to ``(R, m, n)``; the rest is what `onto` holds, or zero."""
        if onto is None:
            onto = factors.new_zeros(len(self.last), *factors.shape[1:])
        return onto.index_copy_(0, self.of_selected, factors)

    def collect(self, per_run: Tensor) -> Tensor:
        """``(R, m, n)`` to the ``(G, m, n)`` of the selected experts."""
        return per_run.index_select(0, self.of_selected)


_Made = TypeVar("_Made")


@dataclass(frozen=True)
class SelectedExperts:
    """Some experts of a stack, in ascending order; factors of an update have a row for each, in this order.

    Attributes:
        experts: their indices.
        num_experts: E.
    """

    experts: tuple[int, ...]
    num_experts: int
    # What is selected never changes, so a device is sent it once: the method that makes it and its arguments -> made.
    _kept: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.experts, self.experts[1:], strict=False))
        in_range = not self.experts or (self.experts[0] >= 0 and self.experts[-1] < self.num_experts)
        if not (self.experts and ascending and in_range):
            raise ValueError(f"{self.experts} are not ascending indices of {self.num_experts} experts")

    def __len__(self) -> int:
        return len(self.experts)

    def slots(self, device: torch.device) -> Tensor:
        """``(E,)`` int64: the place of each expert among the selected; G for one that is not."""
        return self._once(self._make_slots, device)

    def indices(self, device: torch.device) -> Tensor:
        """``(G,)`` int64: the experts themselves."""
        return self._once(self._make_indices, device)

    def runs(self, device: torch.device, others: Sequence[SelectedExperts] = ()) -> Runs:
        """The runs of experts; those of `others`, which have none in common with these, stand alone as well."""
        return self._once(self._make_runs, device, tuple(other.experts for other in others))

    def is_apart_from(self, other: SelectedExperts) -> bool:
        """Whether both have no expert in common."""
        return not {*self.experts} & {*other.experts}

    def _once(self, make: Callable[..., _Made], *arguments: Any) -> _Made:
        """What `make` gives for these arguments, made at the first call."""
        if _is_traced():
            return make(*arguments)
        key = (make.__name__, *arguments)
        if key not in self._kept:
            # What is made in inference mode could not be kept for a backward pass by a later step.
            with torch.inference_mode(False):
                self._kept[key] = make(*arguments)
        made: _Made = self._kept[key]
        return made

    def _make_slots(self, device: torch.device) -> Tensor:
        place = {expert: slot for slot, expert in enumerate(self.experts)}
        return torch.tensor([place.get(expert, len(self)) for expert in range(self.num_experts)], device=device)

    def _make_indices(self, device: torch.device) -> Tensor:
        return torch.tensor(self.experts, device=device)

    def _make_runs(self, device: torch.device, others: tuple[tuple[int, ...], ...]) -> Runs:
        alone = {*self.experts}.union(*others)
        ends = alone | {expert - 1 for expert in alone} | {self.num_experts - 1}
        last = [expert for expert in range(self.num_experts) if expert in ends]
        run_of = {expert: run for run, expert in enumerate(last)}
        of_selected = [run_of[expert] for expert in self.experts]
        is_alone = [expert in alone for expert in last]
        return Runs(*(torch.tensor(each, device=device) for each in (last, of_selected, is_alone)))


def _is_traced() -> bool:
    """Whether tensors stand for others: what is made then must not be kept, and what is kept not be used then."""
    return torch.compiler.is_compiling() or detect_fake_mode() is not None
