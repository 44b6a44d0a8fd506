"""A module of routed experts with grouped LoRA on its two projections."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from trl_moe_ext.errors import AdapterFileError, ConfigError, LayoutError
from trl_moe_ext.experts.gates import recognise_gate
from trl_moe_ext.experts.layout import (
    ExpertsLayout,
    Projection,
    check_dtypes,
    expert_weights,
    stack_of,
    weight_view,
)
from trl_moe_ext.experts.probe import check_reading
from trl_moe_ext.experts.reading import read_layout
from trl_moe_ext.kernels.dropout import draw_seed
from trl_moe_ext.kernels.experts_mlp import Updates
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.lora_linear import LowRank
from trl_moe_ext.kernels.registry import Kernel
from trl_moe_ext.plugins import host
from trl_moe_ext.tuners.moe_lora.bias_merging import check_bias_mergeable, merge_bias, unmerge_bias
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.router_bias import BiasedRouter, RouterBias, bias_of


class ExpertFactors(nn.Module):
    """One side (A or B) of an adapter's low-rank factors of a module of experts, a parameter for each projection.

    The parameters carry the names of the stacks they adapt and are ``(E, r, in)`` for A, ``(E, out, r)`` for B.
    """

    def __init__(self, shapes: dict[str, tuple[int, int, int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class MoeLoraExperts(nn.Module, LoraLayer):  # type: ignore[misc]
    """Wraps a module of routed experts; called with the same arguments, it returns the same ``(T, H)`` tensor.

    Its state dict has ``lora_A.<adapter>.<projection>`` and ``lora_B.<adapter>.<projection>``, with the projection's
    parameter name, so that PEFT's saving, loading, switching and deleting work as for its own layers. An adapter with
    a bias for the choice of experts has ``lora_router_bias.<adapter>.bias`` too.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = (*LoraLayer.other_param_names, "kernels", "lora_router_bias")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: MoeLoraConfig, r: int, lora_alpha: float, **kwargs: Any
    ) -> None:
        super().__init__()
        layout = read_layout(base_layer)
        if layout is None:
            raise LayoutError(f"{type(base_layer).__name__} is not a module of routed experts that can be read")
        check_dtypes(base_layer, layout)
        check_reading(base_layer, layout)
        self.layout: ExpertsLayout = layout
        self._closed_form = recognise_gate(base_layer, layout)
        # Families call the three arguments differently, and some pass them by keyword.
        self._argument_names = tuple(inspect.signature(base_layer.forward).parameters)[:3]
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.kernels: dict[str, Callable[..., Tensor]] = {}
        self.lora_router_bias = nn.ModuleDict()
        self.biased_routers: list[BiasedRouter] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def __getattr__(self, name: str) -> Any:
        # The surrounding block may read `num_experts` or a weight from its experts module; hooks and other private
        # state belong to the wrapper or to the wrapped module, never to both.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return self.layout.projections[0].in_features, self.layout.projections[-1].out_features

    # -- adapters ----------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: MoeLoraConfig, **kwargs: Any) -> None:
        """Create the factors of an adapter: A random, B zero, so that the output does not change."""
        if r < 1:
            raise ConfigError(f"the rank on experts is {r}; use an integer of at least 1")
        adapted = [p for p in self.layout.projections if self._is_adapted(p, config)]
        experts = self.layout.num_experts
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name] = config.use_rslora
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self.lora_A[adapter_name] = ExpertFactors({p.name: (experts, r, p.in_features) for p in adapted})
        self.lora_B[adapter_name] = ExpertFactors({p.name: (experts, p.out_features, r) for p in adapted})
        self.kernels[adapter_name] = _kernel(config)
        bias_size = getattr(config, "router_bias_size", None)  # what the targets found for this module
        if bias_size is not None:
            self.lora_router_bias[adapter_name] = RouterBias(bias_size)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _is_adapted(self, projection: Projection, config: MoeLoraConfig) -> bool:
        names = getattr(config, "projection_names", None)  # what the targets chose for this module
        return config.expert_projections in ("both", projection.word) if names is None else projection.name in names

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initialise each expert's factors as PEFT initialises those of a Linear of the same shape."""
        for A in self.lora_A[adapter_name].parameters():
            if init_lora_weights == "gaussian":
                nn.init.normal_(A, std=1 / self.r[adapter_name])
            else:
                # Kaiming with a = sqrt(5), the default of nn.Linear, is uniform within 1 / sqrt(fan_in).
                nn.init.uniform_(A, -1 / math.sqrt(A.shape[2]), 1 / math.sqrt(A.shape[2]))
        for B in self.lora_B[adapter_name].parameters():
            if init_lora_weights is False:
                nn.init.uniform_(B, -1 / math.sqrt(B.shape[2]), 1 / math.sqrt(B.shape[2]))
            else:
                nn.init.zeros_(B)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        weight = self._frozen_stack()
        for factors in (self.lora_A[adapter_name], self.lora_B[adapter_name]):
            if not any(p.device.type == "meta" for p in factors.parameters()):
                factors.to(device or weight.device, dtype=weight.dtype)
        bias = bias_of(self, adapter_name)
        if bias is not None and bias.device.type != "meta":
            self.lora_router_bias[adapter_name].to(device or weight.device)  # in float32

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the wrapped module: ``(T, H)`` tokens, ``(T, K)`` chosen experts and ``(T, K)`` weights to ``(T, H)``."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError("one batch with several adapters (adapter_names) is not supported on routed experts")
        adapters = self.adapters_to_apply()
        if not adapters and self.layout.sparse_block is None:
            out: Tensor = self.base_layer(*args, **kwargs)
            return out
        arguments = [*args, *(kwargs.pop(name) for name in self._argument_names[len(args) :] if name in kwargs)]
        if kwargs or len(arguments) > 3:
            raise LayoutError(
                f"{type(self.get_base_layer()).__name__} was called with {sorted(kwargs) or len(arguments)} besides "
                f"{', '.join(self._argument_names)}: what that changes is not known. Describe the family in a plug-in "
                "(hook register_experts_families, see docs/families.md)"
            )
        self._check_device(arguments[0])
        return self._run(adapters, *arguments)

    def adapters_to_apply(self) -> list[str]:
        """The active adapters whose updates are to be added to the output."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.lora_A]

    def _run(self, adapters: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        kernel: Callable[..., Tensor] = self.kernels[adapters[0]] if adapters else fused_experts_mlp
        out = kernel(
            # Some families keep batch and sequence apart here.
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            top_k_index.reshape(-1, top_k_index.shape[-1]),
            top_k_weights.reshape(-1, top_k_weights.shape[-1]),
            expert_weights(self.get_base_layer(), self.layout)._replace(closed_form=self._closed_form),
            **{
                f"{projection.role}_updates": self._updates(adapters, projection, hidden_states.device)
                for projection in self.layout.projections
            },
        )
        return out.view(hidden_states.shape)

    def _frozen_stack(self) -> Tensor:
        return stack_of(self.get_base_layer(), self.layout.projections[-1])

    def _check_device(self, hidden_states: Tensor) -> None:
        # Hooks that bring offloaded weights in run when a module is called; the kernel takes the weights themselves.
        weight = self._frozen_stack()
        if weight.device != hidden_states.device:
            raise LayoutError(
                f"the experts are on {weight.device} and their tokens on {hidden_states.device}: offloaded experts "
                "cannot be adapted yet. Load the model without offloading, or leave 'experts' out of moe_target"
            )

    def _updates(self, adapters: list[str], projection: Projection, device: torch.device) -> Updates:
        return tuple(
            LowRank(
                A=getattr(self.lora_A[name], projection.name),
                B=getattr(self.lora_B[name], projection.name),
                scaling=self.scaling[name],
                dropout=(p := self._dropout(name)),
                seed=draw_seed(device) if p else None,
            )
            for name in adapters
            if hasattr(self.lora_A[name], projection.name)
        )

    def _dropout(self, adapter_name: str) -> float:
        dropout = self.lora_dropout[adapter_name]
        return float(dropout.p) if dropout.training and isinstance(dropout, nn.Dropout) else 0.0

    # -- merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or the named) adapters to the frozen weights, one expert at a time.

        Raises:
            AdapterFileError: with `safe_merge`, a merged weight would not be finite; then nothing has changed.
            ConfigError: the adapter has a bias for the choice of experts, and the family has no place for it.
        """
        self.check_mergeable(adapter_names, safe_merge)
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            for expert_weight, delta in self._deltas(name):
                expert_weight.copy_(expert_weight.to(delta.dtype) + delta)
            merge_bias(self, name)
            self.merged_adapters.append(name)

    def check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise what `merge` would raise; nothing is changed."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.lora_A and name not in self.merged_adapters:
                check_bias_mergeable(self, name)
                if safe_merge:
                    self._check_finite(name)

    def unmerge(self) -> None:
        """Subtract every merged adapter again; exact up to the rounding of the weights' dtype."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            for expert_weight, delta in self._deltas(name):
                expert_weight.copy_(expert_weight.to(delta.dtype) - delta)
            unmerge_bias(self, name)

    @torch.no_grad()
    def _deltas(self, adapter_name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """For every adapted projection and expert: its ``(out, in)`` weight, a view, and its update."""
        for projection in self.layout.projections:
            A = getattr(self.lora_A[adapter_name], projection.name, None)
            if A is None:
                continue
            B = getattr(self.lora_B[adapter_name], projection.name)
            stack = weight_view(self.get_base_layer(), projection, self.layout).detach()
            dtype = torch.promote_types(stack.dtype, torch.float32)
            for expert in range(self.layout.num_experts):
                update = self.scaling[adapter_name] * (B[expert].to(dtype) @ A[expert].to(dtype))
                yield stack[expert].t(), update.to(stack.device)

    def _check_finite(self, adapter_name: str) -> None:
        for expert_weight, delta in self._deltas(adapter_name):
            if not torch.isfinite(expert_weight.to(delta.dtype) + delta).all():
                raise AdapterFileError(
                    f"adapter {adapter_name!r} would make expert weights that are not finite (NaN or infinite); "
                    "nothing was merged. Load an intact adapter"
                )

    def __repr__(self) -> str:
        return "moe_" + super().__repr__()


def _kernel(config: MoeLoraConfig) -> Callable[..., Tensor]:
    kernel: Kernel = host().lookup("register_kernels", config.kernel)
    if kernel.chooses_activations:
        return partial(kernel.experts_mlp, save_activations=config.save_activations)
    if config.save_activations != "gate_up":
        raise ConfigError(
            f"save_activations={config.save_activations!r} has no effect with kernel {config.kernel!r}, which does "
            "not offer the choice; leave it out, or use kernel 'fused'"
        )
    return kernel.experts_mlp
