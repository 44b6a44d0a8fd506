"""What adapters of MOE_ESFT add to frozen weights, and where layers keep it.

Legend: E experts of a module, G of them trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def sum_of(several: Sequence[ExpertsDeltas]) -> ExpertsDeltas:
    """What adapters add together, for all experts that one of them trains; gradients flow back to each."""
    if len(several) == 1:
        return several[0]
    experts = sorted({expert for deltas in several for expert in deltas.selected.experts})
    union = SelectedExperts(tuple(experts), several[0].selected.num_experts)
    sums: dict[str, Tensor] = {}
    for deltas in several:
        for name, delta in deltas._asdict().items():
            if isinstance(delta, Tensor):
                before = sums.get(name)
                before = delta.new_zeros(len(union), *delta.shape[1:]) if before is None else before
                dtype = torch.promote_types(before.dtype, delta.dtype)
                # On the device of the delta, where both know their experts already.
                index = union.slots(delta.device)[deltas.selected.indices(delta.device)]
                sums[name] = before.to(dtype).index_add(0, index, delta.to(dtype))
    return ExpertsDeltas(union, **sums)
