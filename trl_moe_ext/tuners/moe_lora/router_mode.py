"""Whether an adapter trains the router: not at all (``frozen``), by LoRA (``lora``), or as a copy of it (``full``).

LoRA on the router is a word of `moe_target` like any other. A full copy is PEFT's own `modules_to_save`.
"""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.anatomy import Anatomy
from trl_moe_ext.experts.finding import ancestors
from trl_moe_ext.router.places import read_places
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.targets.exclusions import keeps
from trl_moe_ext.tuners.targets.resolve import Targets


def modules_to_save(config: MoeLoraConfig, targets: Targets, model: nn.Module) -> list[str] | None:
    """What PEFT shall train and save in full: what the user named, and the routers with ``router_mode="full"``.

    Args:
        config: of the adapter.
        targets: what the adapter takes from the model otherwise.
        model: with or without other adapters.

    Raises:
        ConfigError: the mode contradicts other options or another adapter, or the model has no router to train.
        LayoutError: the model has experts whose router cannot be told.
    """
    adapted = _adapted_router_parts(targets)
    if config.router_mode in ("frozen", "full") and adapted:
        raise ConfigError(
            f"router_mode={config.router_mode!r} contradicts target_modules or target_parameters, which put LoRA on "
            f"{adapted[0]!r}, a part of the router. Name other modules, or use router_mode='lora'"
        )
    _refuse_lora_on_a_copy(adapted, model)
    named: list[str] | None = config.modules_to_save
    if config.router_mode == "frozen" and named:
        _refuse_a_frozen_copy(named, model)
    if config.router_mode != "full":
        return named
    routers = _routers_to_copy(config, targets.anatomy, model)
    missing = [name for name in routers if name not in (named or [])]
    if missing and config.saved_with is not None:
        raise ConfigError(f"it has no copy of the router {missing[0]!r}")
    return [*(named or []), *missing]


def _adapted_router_parts(targets: Targets) -> list[str]:
    """Names of the matrices of routers that LoRA is put on."""
    bare = targets.anatomy.parameters["router"]
    taken = [name for name in bare if any(f".{name}".endswith(f".{target}") for target in targets.parameters)]
    return sorted([*taken, *(name for name in targets.anatomy.router if name in targets.linears)])


def _refuse_a_frozen_copy(named: list[str], model: nn.Module) -> None:
    for router in find_routers(model):
        if router.name.endswith(tuple(named)):  # as PEFT matches them
            raise ConfigError(
                f"router_mode='frozen' contradicts modules_to_save={named}, which trains a copy of the router "
                f"{router.name!r}. Leave one of them out"
            )


def _refuse_lora_on_a_copy(parts: list[str], model: nn.Module) -> None:
    places = read_places(model) if parts else {}
    for part in parts:
        for name in (*ancestors(part), part):
            wrapper = places[name].called if name in places else None
            if isinstance(wrapper, ModulesToSaveWrapper):
                raise ConfigError(
                    _two_ways(name, f"adapter {_first(wrapper.modules_to_save)!r} trains a copy of", "LoRA")
                )


def _routers_to_copy(config: MoeLoraConfig, anatomy: Anatomy, model: nn.Module) -> list[str]:
    routers = find_routers(model)
    if not routers:
        raise ConfigError("router_mode='full': the model has no router that is learned. Leave router_mode out")
    # The names may be in `modules_to_save` already, and what is in there is left out of everything else.
    unsaved = copy.copy(config)
    unsaved.modules_to_save = None
    names = [name for router in routers for name in _without_experts(router.name, router.experts, anatomy)]
    kept = [name for name in names if keeps(unsaved, name)]
    if not kept:
        raise ConfigError(
            f"router_mode='full' trains nothing: exclude_modules={config.exclude_modules} and layers_to_transform="
            f"{config.layers_to_transform} leave none of {len(names)} routers. Leave router_mode out"
        )
    places = read_places(model)
    for name in kept:
        _check_trainable(name, places[name].called)
    return kept


def _check_trainable(name: str, router: nn.Module) -> None:
    inside = [module for module in router.modules() if isinstance(module, BaseTunerLayer)]
    if inside:
        raise ConfigError(_two_ways(name, f"adapter {_first(inside[0].r)!r} puts LoRA on", "a full copy"))
    packed = [f"{name}.{own} ({p.dtype})" for own, p in router.named_parameters() if not p.is_floating_point()]
    if packed:
        raise ConfigError(
            f"router_mode='full' cannot train {packed[0]}: the router is quantised. Leave it out of the quantisation "
            f"(llm_int8_skip_modules=[{name.rpartition('.')[2]!r}] with bitsandbytes), or use router_mode='lora'"
        )


def _without_experts(router: str, experts: str, anatomy: Anatomy) -> list[str]:
    """A router that is its block as well holds the experts: then only its own matrices are meant."""
    if not f"{experts}.".startswith(f"{router}."):
        return [router]
    return [name for name in anatomy.router if name.startswith(f"{router}.")]


def _two_ways(name: str, other: str, this: str) -> str:
    return (
        f"{other} the router {name!r}, and this adapter asks for {this}: one model cannot have both. Train both "
        "adapters with the same router_mode, or load them on models of their own"
    )


def _first(adapters: Any) -> str:
    return str(next(iter(adapters.keys())))
