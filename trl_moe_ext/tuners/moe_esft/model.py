"""The PEFT model of MOE_ESFT: chosen experts and Linears, trained in full by what is added to them."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import nn

from trl_moe_ext.errors import ConfigError, some_of
from trl_moe_ext.experts.reading import read_layout
from trl_moe_ext.tuners.experts_tuner import ExpertsTuner
from trl_moe_ext.tuners.moe_esft.config import NO_SELECTION, MoeEsftConfig
from trl_moe_ext.tuners.moe_esft.deltas import EsftLayer
from trl_moe_ext.tuners.moe_esft.layer import MoeEsftExperts, MoeEsftRows
from trl_moe_ext.tuners.moe_esft.linear import MoeEsftLinear
from trl_moe_ext.tuners.targets.resolve import Targets, base_modules

_SHOWN = 3  # modules that modules_to_save is suggested for


class MoeEsftModel(ExpertsTuner):
    """Trains the weights of chosen experts, and of the Linears that the config names, and no others.

    Made by `peft.get_peft_model` from a `MoeEsftConfig`; everything else is as for PEFT's other models.
    """

    prefix: str = "esft_"
    tuner_layer_cls = EsftLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    dense_effect = "moe_esft trains the Linears of its MLPs in full"

    def _targets(self, config: MoeEsftConfig) -> Targets:
        targets = super()._targets(config)
        if (targets.experts or targets.expert_linears) and not config.selection_is_given:
            raise ConfigError(f"target_modules={config.target_modules!r} names routed experts, and {NO_SELECTION}")
        unchosen = sorted(targets.experts.keys() - (targets.selection or targets.experts).keys())
        if unchosen:
            raise ConfigError(
                f"no experts are chosen of {unchosen[0]!r}, and moe_esft would train all of them in full; leave the "
                "module out with exclude_modules, or choose experts with selected_experts"
            )
        _refuse_other_than_linears(targets, self.model)
        return targets

    def _adapt(
        self,
        config: MoeEsftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None,
    ) -> None:
        of_module: Any = copy.copy(config)
        of_module.projection_names = config.resolved.experts.get(current_key)
        of_module.chosen_experts = (config.resolved.selection or {}).get(current_key)
        if isinstance(target, MoeEsftExperts | MoeEsftLinear):
            target.update_layer(adapter_name, of_module)
            return
        layout = read_layout(target)
        layer: nn.Module
        if layout is not None:
            layer = (MoeEsftRows if layout.takes_rows else MoeEsftExperts)(target, adapter_name, of_module)
        else:
            assert isinstance(target, nn.Linear), "the targets have been checked"
            layer = MoeEsftLinear(target, adapter_name, of_module)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # PEFT sets what is active when all layers are there
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's would look for the one `weight` of a module. Deltas are made on the device of theirs.
        setattr(parent, child_name, new_module)


def _refuse_other_than_linears(targets: Targets, model: nn.Module) -> None:
    """Raise ConfigError for what has no layer here: bare parameters, embeddings, quantised Linears."""
    if targets.parameters:
        owners = sorted({name.rpartition(".")[0] for name in targets.parameters})
        raise ConfigError(
            f"{some_of(map(repr, targets.parameters))} are no Linears but parameters that their modules multiply by "
            "themselves: moe_esft cannot train them. Leave their part out of moe_target and target_modules, or have "
            f"PEFT train a copy of the modules with modules_to_save={owners[:_SHOWN]}"
        )
    modules = dict(base_modules(model))
    chosen = sorted({*targets.linears, *targets.expert_linears})
    others = [name for name in chosen if not isinstance(modules[name], nn.Linear)]
    if others:
        kinds = sorted({type(modules[name]).__name__ for name in others})
        raise ConfigError(
            f"{some_of(map(repr, others))} are {', '.join(kinds)}, and moe_esft trains Linears and stacked experts "
            "only. Leave them out with exclude_modules or another moe_target, or use peft_type moe_lora"
        )
    quantised = [name for name in chosen if not modules[name].weight.is_floating_point()]  # type: ignore[operator]
    if quantised:
        raise ConfigError(
            f"{some_of(map(repr, quantised))} are quantised and cannot be trained in full; load the model in "
            "bfloat16, or use peft_type moe_lora"
        )
