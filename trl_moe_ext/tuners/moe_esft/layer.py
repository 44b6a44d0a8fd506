"""One module of routed experts of which some are trained in full, as PEFT sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from trl_moe_ext.experts.layout import Projection, weight_view
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.selected import SelectedExperts
from trl_moe_ext.kernels.trained import ExpertsDeltas, trained_experts_mlp, trained_rows
from trl_moe_ext.tuners.adapted_experts import AdaptedExperts
from trl_moe_ext.tuners.moe_esft.config import MoeEsftConfig
from trl_moe_ext.tuners.moe_esft.deltas import Deltas, EsftLayer, JointSelection, joint_selection, sum_of
from trl_moe_ext.tuners.selection.indices import SelectedIndices


class MoeEsftExperts(AdaptedExperts, EsftLayer):
    """Wraps a module of routed experts; called with the same arguments, it returns the same ``(T, H)`` tensor.

    Its state dict has ``esft_delta.<adapter>.<projection>``: ``(G, *shape of one expert)``, as the family stores it,
    for the G experts that are trained, and ``(G, out)`` under the name of a bias. Where experts are left out, their
    indices are in ``esft_selected.<adapter>.experts``.
    """

    other_param_names = ("esft_selected", "selections")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoeEsftConfig) -> None:
        super().__init__(base_layer)
        self.base_layer = base_layer
        self._start(adapter_name)
        self.esft_selected = nn.ModuleDict()
        self.selections: dict[str, SelectedExperts] = {}
        self._union: JointSelection | None = None
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MoeEsftConfig) -> None:
        """Create the deltas of an adapter, of zero.

        Args:
            config: of the adapter, with what the targets found for this module: ``projection_names``, those that are
                trained, and ``chosen_experts``, the indices of the trained experts or None for all.
        """
        chosen: Sequence[int] | None = config.chosen_experts
        num_experts = self.layout.num_experts
        selected = SelectedExperts(tuple(range(num_experts) if chosen is None else chosen), num_experts)
        trained = [p for p in self.layout.projections if p.name in config.projection_names]
        shapes: dict[str, tuple[int, ...]] = {}
        for p in trained:
            one = (p.in_features, p.out_features) if p.is_transposed else (p.out_features, p.in_features)
            shapes[p.name] = (len(selected), *one)
            if p.bias is not None:
                shapes[p.bias] = (len(selected), p.out_features)
        self.selections[adapter_name] = selected
        if adapter_name in self.esft_selected:  # of an adapter of the same name, which this one replaces
            del self.esft_selected[adapter_name]
        if len(selected) < num_experts:
            self.esft_selected[adapter_name] = SelectedIndices({"experts": selected})
        self.esft_delta[adapter_name] = Deltas(shapes, self._frozen_stack())
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    # -- forward -----------------------------------------------------------------------------------------------------

    def _run(self, adapters: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # Some families keep batch and sequence apart here.
        hidden, index, weights = (x.reshape(-1, x.shape[-1]) for x in (hidden_states, top_k_index, top_k_weights))
        frozen = self.frozen_weights()
        if adapters:
            out = trained_experts_mlp(hidden, index, weights, frozen, self._sum(adapters))
        else:
            out = fused_experts_mlp(hidden, index, weights, frozen, (), ())
        return out.view(hidden_states.shape)

    def deltas(self, adapter_name: str) -> ExpertsDeltas:
        """What an adapter adds, as the kernel takes it; views of its parameters."""
        return ExpertsDeltas(
            self.selections[adapter_name], **{role: delta for role, _, delta in self._trained(adapter_name)}
        )

    def _sum(self, adapters: list[str]) -> ExpertsDeltas:
        deltas = [self.deltas(name) for name in adapters]
        return deltas[0] if len(deltas) == 1 else sum_of(deltas, self._union_of([d.selected for d in deltas]))

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; nothing of the adapter is left."""
        super().delete_adapter(adapter_name)
        self._union = None

    def _union_of(self, selections: list[SelectedExperts]) -> JointSelection:
        """The last one again, while the same selections are active."""
        if self._union is not None and self._union.selections == (*selections,):
            return self._union
        union = joint_selection(selections)
        if not torch.compiler.is_compiling():
            self._union = union
        return union

    def _trained(self, adapter_name: str) -> Iterator[tuple[str, Projection, Tensor]]:
        """The role of each delta in the kernel, its projection, and the delta: ``(G, in, out)``, or ``(G, out)``."""
        deltas = self.esft_delta[adapter_name]
        assert isinstance(deltas, Deltas)
        for projection in self.layout.projections:
            stack, bias = deltas.of(projection.name), deltas.of(projection.bias)
            if stack is not None:
                yield projection.role, projection, stack if projection.is_transposed else stack.transpose(1, 2)
            if bias is not None:
                yield f"{projection.role}_bias", projection, bias

    # -- merging -----------------------------------------------------------------------------------------------------

    def _deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """For every trained expert: each of its weights and biases, a view, and what is added to it."""
        base = self.get_base_layer()
        for role, projection, delta in self._trained(adapter_name):
            is_bias = role.endswith("_bias")
            frozen = getattr(base, projection.bias or "") if is_bias else weight_view(base, projection, self.layout)
            for place, expert in enumerate(self.selections[adapter_name].experts):
                yield frozen[expert], delta[place]


class MoeEsftRows(MoeEsftExperts):
    """Wraps one stack of Linears; called with ``(S, in)`` rows and the number of rows of each expert."""

    def _run(self, adapters: list[str], rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:  # type: ignore[override]
        (projection,) = self.layout.projections
        weight = weight_view(self.get_base_layer(), projection, self.layout)
        deltas = self._sum(adapters)
        assert deltas.up is not None, "an adapter without a delta of the only projection holds nothing"
        return trained_rows(rows, rows_per_expert, weight, deltas.up, deltas.selected)
