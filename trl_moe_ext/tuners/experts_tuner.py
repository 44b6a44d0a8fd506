"""What the PEFT models of all tuners here share: targets, layers for shared weights, merging as a whole, loading."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule
from peft.utils.other import _set_adapter
from torch import Tensor, nn

from trl_moe_ext.errors import AdapterFileError, ConfigError, LayoutError
from trl_moe_ext.router.precision import restore_precision
from trl_moe_ext.tuners.adapted_experts import AdaptedExperts
from trl_moe_ext.tuners.adapter_files import check_adapter_state, with_aliases
from trl_moe_ext.tuners.merging import MergesDeltas
from trl_moe_ext.tuners.targets.blocks import restore_blocks, use_sparse_block
from trl_moe_ext.tuners.targets.resolve import Targets, resolve_targets
from trl_moe_ext.tuners.targets.tied import TiedLayers, unwrap_tied


class ExpertsTuner(BaseTuner):  # type: ignore[misc]
    """A PEFT model whose config has `TargetOptions`.

    A tuner's model derives from it (first, where it has other bases) and says what it adds to the targets and how one
    module is adapted.

    Attributes:
        dense_effect: what it does with 'experts' on a model without any, for the warning.
    """

    dense_effect: str

    # -- what a tuner says -------------------------------------------------------------------------------------------

    def _targets(self, config: Any) -> Targets:
        """What an adapter takes from the model, checked and written into `config`; a tuner may extend it.

        Raises:
            ConfigError, LayoutError: the config asks for what the model does not have or this tuner cannot adapt.
        """
        return resolve_targets(config, self.model)

    @abstractmethod
    def _adapt(
        self,
        config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None,
    ) -> None:
        """Put a layer with the adapter in the place of `target`, or add the adapter to it if it is such a layer."""

    # -- targets -----------------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        try:
            targets = self._targets(peft_config)
        except (ConfigError, LayoutError) as error:
            if peft_config.saved_with is None:
                raise
            raise AdapterFileError(
                f"the adapter, made for {peft_config.base_model_name_or_path}, does not fit "
                f"{type(self.model).__name__}: {error}. Load it on the model that it was made for"
            ) from error
        if targets.is_dense and "experts" in peft_config.moe_target and peft_config.saved_with is None:
            warnings.warn(f"{type(self.model).__name__} has no routed experts: {self.dense_effect}", stacklevel=2)
        # On the config, but not one of its fields: it goes where the config goes, and is not saved.
        peft_config.resolved = targets
        if targets.selection is not None:
            peft_config.selected_experts = {name: [*experts] for name, experts in sorted(targets.selection.items())}
        peft_config.target_modules = targets.words
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        if key in peft_config.resolved:
            return True
        # PEFT wants to know whether `exclude_modules` excluded anything.
        if key in peft_config.resolved.excluded:
            return _ExcludedModule()
        found = super()._check_target_module_exists(peft_config, key)
        return found if isinstance(found, _ExcludedModule) else False

    # -- layers ------------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in PEFT; modules with the same weights, as in a tied encoder and decoder, get one layer."""
        self._tied = TiedLayers(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self._tied

    def _create_and_replace(
        self,
        peft_config: Any,
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
            if adapter_name in tied._get_available_adapters():  # type: ignore[operator]
                return
            target = tied
        self._adapt(peft_config, adapter_name, target, target_name, parent, current_key, parameter_name)
        adapted = getattr(parent, target_name)
        if parameter_name is None:
            self._tied.add(adapted)
        if isinstance(adapted, AdaptedExperts):
            use_sparse_block(parent, adapted.layout)

    # -- merging and loading -----------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT; all layers are checked before the first weight changes."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
            if adapter_names:
                _set_adapter(self.model, adapter_names)  # PEFT would keep the copies of the active adapter
        model: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        unwrap_tied(model)
        restore_blocks(model)
        restore_precision(model)
        return model

    def _check_mergeable(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        for module in self.modules():
            if isinstance(module, MergesDeltas):
                module.check_mergeable(adapter_names, safe_merge)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter_state(model, state, adapter_name, cls.prefix)
        return with_aliases(model, state)
