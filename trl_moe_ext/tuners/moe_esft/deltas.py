"""What adapters of MOE_ESFT add to frozen weights, and where layers keep it.

Legend: E experts of a module, G of them trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trl_moe_ext.kernels.selected import SelectedExperts
from trl_moe_ext.kernels.trained import ExpertsDeltas
from trl_moe_ext.tuners.merging import MergesDeltas


class Deltas(nn.Module):
    """What one adapter adds to the weights of one module: a parameter for each of them, under its name.

    It starts at zero, so that the output does not change.

    Args:
        shapes: name -> shape.
        like: a frozen weight; the deltas get its dtype and device.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], like: Tensor) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(*shape, dtype=like.dtype, device=like.device)))

    def of(self, name: str | None) -> Tensor | None:
        """The delta of a weight; None if it is not trained, or there is no such weight."""
        return None if name is None else self._parameters.get(name)


class EsftLayer(MergesDeltas):
    """A layer whose frozen weights have deltas.

    Attributes:
        esft_delta: adapter -> its `Deltas`.
    """

    adapter_layer_names = ("esft_delta",)
    esft_delta: nn.ModuleDict

    def _start(self, adapter_name: str) -> None:
        """The state of a layer whose first adapter is to be created."""
        self.esft_delta = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.esft_delta


class JointSelection(NamedTuple):
    """The experts that some selections choose together.

    Attributes:
        selections: which ones they are.
        experts: all of theirs.
        places: for each selection, where its experts stand among those.
    """

    selections: tuple[SelectedExperts, ...]
    experts: SelectedExperts
    places: tuple[SelectedExperts, ...]


def joint_selection(selections: Sequence[SelectedExperts]) -> JointSelection:
    """The union of selections of one module. It holds no tensor of its own: its parts send each device theirs once."""
    experts = sorted({expert for selected in selections for expert in selected.experts})
    place = {expert: number for number, expert in enumerate(experts)}
    places = (tuple(place[expert] for expert in selected.experts) for selected in selections)
    return JointSelection(
        tuple(selections),
        SelectedExperts(tuple(experts), selections[0].num_experts),
        tuple(SelectedExperts(each, len(experts)) for each in places),
    )


def sum_of(several: Sequence[ExpertsDeltas], union: JointSelection) -> ExpertsDeltas:
    """What adapters add together, for all experts that one of them trains; gradients flow back to each.

    Args:
        several: what each adds.
        union: of their selections, in the same order.
    """
    sums: dict[str, Tensor] = {}
    for deltas, places in zip(several, union.places, strict=True):
        for name, delta in deltas._asdict().items():
            if isinstance(delta, Tensor):
                before = sums.get(name)
                before = delta.new_zeros(len(union.experts), *delta.shape[1:]) if before is None else before
                dtype = torch.promote_types(before.dtype, delta.dtype)
                sums[name] = before.to(dtype).index_add(0, places.indices(delta.device), delta.to(dtype))
    return ExpertsDeltas(union.experts, **sums)
