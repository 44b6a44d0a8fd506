"""One module of routed experts with low-rank adapters, as PEFT sees it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.layout import Projection, weight_view
from trl_moe_ext.kernels.dropout import draw_seed
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.low_rank import LowRank, Updates
from trl_moe_ext.tuners.adapted_experts import AdaptedExperts
from trl_moe_ext.tuners.moe_lora.adapter_kernels import check_together, kernel_of, words_of
from trl_moe_ext.tuners.moe_lora.bias_merging import check_bias_mergeable, merge_bias, unmerge_bias
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.factors import (
    ExpertFactors,
    RankClass,
    each_expert,
    indices_of,
    initialise,
    rank_classes,
)
from trl_moe_ext.tuners.moe_lora.router_bias import BiasedRouter, RouterBias, bias_of


class MoeLoraExperts(AdaptedExperts, LoraLayer):  # type: ignore[misc]
    """Wraps a module of routed experts; called with the same arguments, it returns the same ``(T, H)`` tensor.

    Its state dict has ``lora_A.<adapter>.<projection>`` and ``lora_B.<adapter>.<projection>``, with the projection's
    parameter name, so that PEFT's saving, loading, switching and deleting work as for its own layers. An adapter of
    some experts has their indices in ``lora_selected.<adapter>.experts``; one with a bias for the choice of experts
    has ``lora_router_bias.<adapter>.bias`` too.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = (
        *LoraLayer.other_param_names,
        "kernels",
        "kernel_words",
        "rank_classes",
        "lora_selected",
        "lora_router_bias",
    )

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MoeLoraConfig, r: int, lora_alpha: float, **kwargs: Any
    ) -> None:
        super().__init__(base_layer)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.kernels: dict[str, Callable[..., Tensor]] = {}
        self.kernel_words: dict[str, str] = {}
        self.rank_classes: dict[str, tuple[RankClass, ...]] = {}
        self.lora_selected = nn.ModuleDict()
        self.lora_router_bias = nn.ModuleDict()
        self.biased_routers: list[BiasedRouter] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return self.layout.projections[0].in_features, self.layout.projections[-1].out_features

    # -- adapters ----------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: MoeLoraConfig, **kwargs: Any) -> None:
        """Create the factors of an adapter: A random, B zero, so that the output does not change."""
        if r < 1:
            raise ConfigError(f"the rank on experts is {r}; use an integer of at least 1")
        for of_adapters in (self.lora_selected, self.lora_router_bias):
            if adapter_name in of_adapters:  # of an adapter of the same name, which this one replaces
                del of_adapters[adapter_name]
        adapted = [p for p in self.layout.projections if self._is_adapted(p, config)]
        experts = self.layout.num_experts
        classes = rank_classes(r, getattr(config, "expert_ranks", None), experts)  # what the targets found
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self.lora_A[adapter_name], self.lora_B[adapter_name] = ExpertFactors.pair(classes, adapted, experts)
        self.rank_classes[adapter_name] = classes
        if any(each.selected is not None for each in classes):
            self.lora_selected[adapter_name] = indices_of(classes)
        self.kernels[adapter_name] = kernel_of(config, adapter_name in self.lora_selected)
        self.kernel_words[adapter_name] = words_of(config)
        bias_size = getattr(config, "router_bias_size", None)  # what the targets found for this module
        if bias_size is not None:
            self.lora_router_bias[adapter_name] = RouterBias(bias_size)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; raises ConfigError for adapters that cannot be active together."""
        self.check_together(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def check_together(self, adapter_names: str | list[str]) -> None:
        """Raise ConfigError for adapters that name different kernels; nothing is changed."""
        check_together(self.kernel_words, [adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def _is_adapted(self, projection: Projection, config: MoeLoraConfig) -> bool:
        names = getattr(config, "projection_names", None)  # what the targets chose for this module
        return config.expert_projections in ("both", projection.word) if names is None else projection.name in names

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initialise each expert's factors as PEFT initialises those of a Linear of the same shape."""
        initialise(self.lora_A[adapter_name], self.lora_B[adapter_name], init_lora_weights)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = self._frozen_stack()
        for factors in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            if not any(p.device.type == "meta" for p in factors.parameters()):
                factors.to(device or weight.device, dtype=weight.dtype)
        bias = bias_of(self, adapter_name)
        if bias is not None and bias.device.type != "meta":
            self.lora_router_bias[adapter_name].to(device or weight.device)  # in float32

    # -- forward -----------------------------------------------------------------------------------------------------

    def holds(self, adapter_name: str) -> bool:
        return adapter_name in self.lora_A

    def _run(self, adapters: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        kernel: Callable[..., Tensor] = self.kernels[adapters[0]] if adapters else fused_experts_mlp
        out = kernel(
            # Some families keep batch and sequence apart here.
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            top_k_index.reshape(-1, top_k_index.shape[-1]),
            top_k_weights.reshape(-1, top_k_weights.shape[-1]),
            self.frozen_weights(),
            **{
                f"{projection.role}_updates": self._updates(adapters, projection, hidden_states.device)
                for projection in self.layout.projections
            },
        )
        return out.view(hidden_states.shape)

    def updates(self, adapter_name: str, projection: Projection) -> Updates:
        """What an adapter adds to a projection, an update for each of its ranks, without dropout."""
        return tuple(
            LowRank(A=A, B=B, scaling=self._scaling(adapter_name, each), selected=each.selected)
            for each in self.rank_classes[adapter_name]
            if (A := getattr(self.lora_A[adapter_name], each.factors_of(projection), None)) is not None
            and (B := getattr(self.lora_B[adapter_name], each.factors_of(projection), None)) is not None
        )

    def _updates(self, adapters: list[str], projection: Projection, device: torch.device) -> Updates:
        updates: list[LowRank] = []
        for name in adapters:
            own = self.updates(name, projection)
            p = self._dropout(name)
            # One seed for all ranks: no row is in two of them.
            seed = draw_seed(device) if p and own else None
            updates += (update._replace(dropout=p, seed=seed) for update in own)
        return tuple(updates)

    def _scaling(self, adapter_name: str, rank_class: RankClass) -> float:
        """Alpha over the rank of a class, or over its root, as for a module of that rank."""
        ratio = self.r[adapter_name] / rank_class.rank
        scaling: float = self.scaling[adapter_name]
        return scaling * (math.sqrt(ratio) if self.use_rslora[adapter_name] else ratio)

    def _dropout(self, adapter_name: str) -> float:
        dropout = self.lora_dropout[adapter_name]
        return float(dropout.p) if dropout.training and isinstance(dropout, nn.Dropout) else 0.0

    # -- merging -----------------------------------------------------------------------------------------------------

    def _deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """For every adapted projection and expert: its ``(out, in)`` weight, a view, and its update."""
        for projection in self.layout.projections:
            factors = self.rank_classes[adapter_name], self.lora_A[adapter_name], self.lora_B[adapter_name]
            stack = weight_view(self.get_base_layer(), projection, self.layout).detach()
            dtype = torch.promote_types(stack.dtype, torch.float32)
            for expert, each, A, B in each_expert(*factors, projection, self.layout.num_experts):
                update = self._scaling(adapter_name, each) * (B.to(dtype) @ A.to(dtype))
                yield stack[expert].t(), update.to(stack.device)

    def _check_mergeable(self, adapter_name: str) -> None:
        check_bias_mergeable(self, adapter_name)

    def _merge_rest(self, adapter_name: str, sign: int) -> None:
        (merge_bias if sign > 0 else unmerge_bias)(self, adapter_name)
