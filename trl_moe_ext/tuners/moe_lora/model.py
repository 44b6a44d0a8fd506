"""The PEFT model of MOE_LORA: PEFT's own LoRA model, which also takes modules of routed experts."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import PeftType
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils.other import _set_adapter
from torch import Tensor, nn

from trl_moe_ext.errors import AdapterFileError, ConfigError, LayoutError
from trl_moe_ext.experts.reading import read_layout
from trl_moe_ext.router.precision import restore_precision
from trl_moe_ext.tuners.moe_lora.adapter_files import check_adapter_state, with_aliases
from trl_moe_ext.tuners.moe_lora.biased_routers import bias_sizes, hook_biased_routers
from trl_moe_ext.tuners.moe_lora.blocks import restore_blocks, use_sparse_block
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts
from trl_moe_ext.tuners.moe_lora.router import MoeLoraRouter
from trl_moe_ext.tuners.moe_lora.router_bias import remove_hooks
from trl_moe_ext.tuners.moe_lora.router_mode import modules_to_save
from trl_moe_ext.tuners.moe_lora.rows import MoeLoraRows
from trl_moe_ext.tuners.moe_lora.targets import resolve_targets
from trl_moe_ext.tuners.moe_lora.tied import TiedLayers, unwrap_tied


class MoeLoraModel(LoraModel):  # type: ignore[misc]
    """LoRA on the Linears that the config chooses and grouped LoRA on its routed experts.

    Made by `peft.get_peft_model` from a `MoeLoraConfig`; everything else is as for `peft.LoraModel`.
    """

    def _prepare_adapter_config(self, peft_config: MoeLoraConfig, model_config: dict[str, Any]) -> MoeLoraConfig:
        try:
            targets = resolve_targets(peft_config, self.model)
            saved = modules_to_save(peft_config, targets, self.model)
            targets.router_bias = bias_sizes(targets, self.model) if peft_config.router_bias else {}
        except (ConfigError, LayoutError) as error:
            if peft_config.saved_with is None:
                raise
            raise AdapterFileError(
                f"the adapter, made for {peft_config.base_model_name_or_path}, does not fit "
                f"{type(self.model).__name__}: {error}. Load it on the model that it was made for"
            ) from error
        if targets.is_dense and "experts" in peft_config.moe_target and peft_config.saved_with is None:
            warnings.warn(
                f"{type(self.model).__name__} has no routed experts: moe_lora trains ordinary LoRA on its Linears",
                stacklevel=2,
            )
        # On the config, but not one of its fields: it goes where the config goes, and is not saved.
        peft_config.resolved = targets
        peft_config.modules_to_save = saved
        peft_config.target_modules = targets.words
        # What the user named stays in the saved config, expert stacks too; `_inject_parameters` leaves those out.
        peft_config.target_parameters = sorted({*(peft_config.target_parameters or []), *targets.parameters}) or None
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; modules with the same weights, as in a tied encoder and decoder, get one layer."""
        self._tied = TiedLayers(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self._tied
        hook_biased_routers(model)

    def _inject_parameters(
        self, peft_config: MoeLoraConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        bare = copy.copy(peft_config)
        bare.target_parameters = peft_config.resolved.parameters
        names: list[str] = super()._inject_parameters(bare, model, adapter_name, low_cpu_mem_usage)
        # The others name stacks of experts, which are adapted already: PEFT would warn that they match nothing.
        return names + [name for name in peft_config.target_parameters if name not in bare.target_parameters]

    def _check_target_module_exists(self, peft_config: MoeLoraConfig, key: str) -> Any:
        if key in peft_config.resolved:
            return True
        # PEFT wants to know whether `exclude_modules` excluded anything.
        if key in peft_config.resolved.excluded:
            return _ExcludedModule()
        found = super()._check_target_module_exists(peft_config, key)
        return found if isinstance(found, _ExcludedModule) else False

    def _create_and_replace(
        self,
        lora_config: MoeLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        tied = self._tied.share(target) if parameter_name is None else None
        if tied is not None:
            setattr(parent, target_name, tied)
            if adapter_name in getattr(tied, "r", ()):
                return
            target = tied
        config = copy.copy(lora_config)
        if parameter_name is not None:
            config.lora_dropout = 0.0  # PEFT merges a bare parameter before it is used: there is no input to drop
        elif current_key in lora_config.resolved.experts or current_key in lora_config.resolved.expert_linears:
            config.projection_names = lora_config.resolved.experts.get(current_key)
            config.router_bias_size = lora_config.resolved.router_bias.get(current_key)
            config.r = lora_config.expert_r or lora_config.r
            if lora_config.expert_alpha is not None:
                config.lora_alpha = lora_config.expert_alpha
        config.is_router = current_key in lora_config.resolved.anatomy.router
        super()._create_and_replace(
            config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
        )
        adapted = getattr(parent, target_name)
        if parameter_name is None:
            self._tied.add(adapted)
        if isinstance(adapted, MoeLoraExperts):
            use_sparse_block(parent, adapted.layout)

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

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; the experts of all layers are checked before the first weight changes."""
        self._check_experts(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> nn.Module:
        if merge:
            self._check_experts(adapter_names, safe_merge)
            if adapter_names:
                _set_adapter(self.model, adapter_names)  # PEFT would keep the copies of the active adapter
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unwrap_tied(model)
        restore_blocks(model)
        remove_hooks(model)
        restore_precision(model)
        return model

    def _check_experts(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for module in self.modules():
            if isinstance(module, MoeLoraExperts):
                module.check_mergeable(adapter_names, safe_merge)

    def _check_add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, MoeLoraExperts) for module in self.modules()):
            raise ConfigError(
                "add_weighted_adapter does not combine adapters on routed experts. Activate several adapters at once "
                "with set_adapter([...]), or merge them into the weights one after the other"
            )
        return super()._check_add_weighted_adapter(adapters, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoeLoraConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter_state(model, state, adapter_name)
        return with_aliases(model, state)
