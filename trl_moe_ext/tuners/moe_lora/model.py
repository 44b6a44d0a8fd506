"""The PEFT model of MOE_LORA: PEFT's own LoRA model, which also takes modules of routed experts."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftType
from peft.tuners.lora.model import LoraModel
from torch import nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.reading import read_layout
from trl_moe_ext.tuners.experts_tuner import ExpertsTuner
from trl_moe_ext.tuners.moe_lora.adapter_kernels import check_kernel
from trl_moe_ext.tuners.moe_lora.biased_routers import bias_sizes, hook_biased_routers
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts
from trl_moe_ext.tuners.moe_lora.ranks import settle_ranks
from trl_moe_ext.tuners.moe_lora.router import MoeLoraRouter
from trl_moe_ext.tuners.moe_lora.router_bias import remove_hooks
from trl_moe_ext.tuners.moe_lora.router_mode import modules_to_save
from trl_moe_ext.tuners.moe_lora.rows import MoeLoraRows
from trl_moe_ext.tuners.targets.resolve import Targets


class MoeLoraModel(ExpertsTuner, LoraModel):  # type: ignore[misc]
    """LoRA on the Linears that the config chooses and grouped LoRA on its routed experts.

    Made by `peft.get_peft_model` from a `MoeLoraConfig`; everything else is as for `peft.LoraModel`.
    """

    dense_effect = "moe_lora trains ordinary LoRA on its Linears"

    def _targets(self, config: MoeLoraConfig) -> Targets:
        targets = super()._targets(config)
        targets.module_ranks = settle_ranks(config, targets, self.model)
        saved = modules_to_save(config, targets, self.model)
        targets.router_bias = bias_sizes(targets, self.model) if config.router_bias else {}
        config.modules_to_save = saved
        return targets

    def _prepare_adapter_config(self, peft_config: MoeLoraConfig, model_config: dict[str, Any]) -> MoeLoraConfig:
        super()._prepare_adapter_config(peft_config, model_config)
        targets: Targets = peft_config.resolved
        check_kernel(peft_config, targets)
        # What the user named stays in the saved config, expert stacks too; `_inject_parameters` leaves those out.
        peft_config.target_parameters = sorted({*(peft_config.target_parameters or []), *targets.parameters}) or None
        for_peft = copy.copy(peft_config)
        for_peft.rank_pattern = targets.module_ranks
        return for_peft

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; modules with the same weights get one layer, and routers their biases."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        hook_biased_routers(model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; all layers are checked before the first one changes."""
        for module in self.modules():
            if isinstance(module, MoeLoraExperts):
                module.check_together(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _inject_parameters(
        self, peft_config: MoeLoraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        bare = copy.copy(peft_config)
        bare.target_parameters = peft_config.resolved.parameters
        names: list[str] = super()._inject_parameters(bare, model, adapter_name, low_cpu_mem_usage)
        # The others name stacks of experts, which are adapted already: PEFT would warn that they match nothing.
        return names + [name for name in peft_config.target_parameters if name not in bare.target_parameters]

    def _adapt(
        self,
        lora_config: MoeLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None,
    ) -> None:
        config = copy.copy(lora_config)
        if parameter_name is not None:
            config.lora_dropout = 0.0  # PEFT merges a bare parameter before it is used: there is no input to drop
        elif current_key in lora_config.resolved.experts or current_key in lora_config.resolved.expert_linears:
            config.projection_names = lora_config.resolved.experts.get(current_key)
            config.router_bias_size = lora_config.resolved.router_bias.get(current_key)
            config.expert_ranks = lora_config.resolved.expert_ranks.get(current_key)
            config.r = lora_config.resolved.linear_ranks.get(current_key, lora_config.expert_r or lora_config.r)
            if lora_config.expert_alpha is not None:
                config.lora_alpha = lora_config.expert_alpha
        config.is_router = current_key in lora_config.resolved.anatomy.router
        LoraModel._create_and_replace(
            self, config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )

    @staticmethod
    def _create_new_module(
        lora_config: MoeLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        layout = read_layout(target)
        if layout is not None and kwargs.get("parameter_name") is None:
            layer = MoeLoraRows if layout.takes_rows else MoeLoraExperts
            return layer(target, adapter_name, lora_config, r=kwargs["r"], lora_alpha=kwargs["lora_alpha"])
        if getattr(lora_config, "is_router", False) and type(target) is nn.Linear:
            return MoeLoraRouter(target, adapter_name, config=lora_config, **kwargs)
        module: nn.Module = LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        return module

    def _check_target_module_compatiblity(
        self, peft_config: MoeLoraConfig, model: nn.Module, target_name: str
    ) -> None:
        # PEFT guards the Mamba layers of hybrid models by the name of the type; what holds for LORA holds here.
        stock = copy.copy(peft_config)
        stock.peft_type = PeftType.LORA
        super()._check_target_module_compatiblity(stock, model, target_name)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        remove_hooks(model)
        return model

    def _check_add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, MoeLoraExperts) for module in self.modules()):
            raise ConfigError(
                "add_weighted_adapter does not combine adapters on routed experts. Activate several adapters at once "
                "with set_adapter([...]), or merge them into the weights one after the other"
            )
        return super()._check_add_weighted_adapter(adapters, *args, **kwargs)
