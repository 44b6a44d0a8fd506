"""The yardstick of MOE_ESFT: the whole parameters of the family's own model, and single layers in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trl_moe_ext.experts.census.calls import compare_with
from trl_moe_ext.experts.layout import ExpertsLayout, expert_weights, weight_view
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.kernels.reference import experts_mlp_reference
from trl_moe_ext.tuners.moe_esft import MoeEsftExperts
from trl_moe_ext.tuners.moe_esft.deltas import EsftLayer


@dataclass(frozen=True)
class TrainedPart:
    """A whole parameter of which an adapter trains some experts, or all of it where it is one of a Linear.

    Attributes:
        weight: the parameter.
        layout: how it stores experts; None for a Linear.
        experts: those that are trained.
    """

    weight: Tensor
    layout: ExpertsLayout | None = None
    experts: tuple[int, ...] = ()

    def chosen(self, of: Tensor) -> Tensor:
        """What the adapter trains of a tensor of the parameter's shape, such as its gradient."""
        return of if self.layout is None else self._by_expert(of)[list(self.experts)]

    def add(self, delta: Tensor) -> None:
        """Add a delta to the parameter, in place."""
        if self.layout is None:
            self.weight.data += delta
        else:
            self._by_expert(self.weight.data)[list(self.experts)] += delta

    def others(self) -> Tensor:
        """A copy of the rows of all other experts."""
        assert self.layout is not None
        chosen = [expert for expert in range(self.layout.num_experts) if expert not in self.experts]
        return self._by_expert(self.weight.detach())[chosen]

    def _by_expert(self, tensor: Tensor) -> Tensor:
        assert self.layout is not None
        experts = self.layout.num_experts
        # All experts one below the other; or with rows behind them that none uses.
        is_flat = tensor.shape[0] % experts == 0 and tensor.shape[0] != experts
        return tensor.view(experts, -1, tensor.shape[1]) if is_flat and tensor.ndim == 2 else tensor[:experts]


def trained_parts(adapted: nn.Module, stock: nn.Module | None = None) -> dict[str, TrainedPart]:
    """Names of the deltas of all adapters -> what each is added to.

    Args:
        adapted: the model with adapters.
        stock: the same model without, whose parameters are meant; else those of `adapted` are.
    """
    parts: dict[str, TrainedPart] = {}
    for name, layer in adapted.named_modules():
        if not isinstance(layer, EsftLayer):
            continue
        base = layer.get_base_layer()
        if stock is not None:
            base = stock.get_submodule(name.removeprefix("base_model.model."))
        for key, _ in layer.esft_delta.named_parameters():
            adapter, _, own = key.rpartition(".")
            part = TrainedPart(base.get_parameter(own)) if not isinstance(layer, MoeEsftExperts) else None
            if isinstance(layer, MoeEsftExperts):
                paths = {p.name: p.parameter for p in layer.layout.projections}
                weight = base.get_parameter(paths.get(own, own))
                part = TrainedPart(weight, layer.layout, layer.selections[adapter].experts)
            assert part is not None
            parts[f"{name}.esft_delta.{key}"] = part
    return parts


def compare_layer(layer: MoeEsftExperts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients by name, of `layer` with the adapter ``default`` and of the reference in float64.

    Args:
        layer: in bfloat16.
    """
    return compare_with(layer, _tokens_reference, _rows_reference)


def _tokens_reference(layer: MoeEsftExperts, index: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    stacks = expert_weights(layer.get_base_layer(), layer.layout)
    merged = ExpertsWeights(**stacks._asdict() | dict(_merged(layer, stacks)))
    return experts_mlp_reference(hidden, index, weights, merged, (), ())


def _merged(layer: MoeEsftExperts, stacks: ExpertsWeights) -> Iterator[tuple[str, Tensor]]:
    deltas = layer.deltas("default")
    chosen = torch.tensor(deltas.selected.experts)
    for role, delta in deltas._asdict().items():
        if isinstance(delta, Tensor):
            yield role, getattr(stacks, role).index_add(0, chosen, delta)


def _rows_reference(layer: MoeEsftExperts, sizes: list[int], rows: Tensor) -> Tensor:
    (projection,) = layer.layout.projections
    weight, deltas = weight_view(layer.get_base_layer(), projection, layer.layout), layer.deltas("default")
    assert deltas.up is not None
    merged = weight.index_add(0, torch.tensor(deltas.selected.experts), deltas.up)
    return torch.cat([F.linear(x, merged[expert].T) for expert, x in enumerate(torch.split(rows, sizes))])
