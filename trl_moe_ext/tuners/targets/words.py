"""The user's words for parts of a model: what they name, and what is wrong with those that name nothing."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from trl_moe_ext.errors import ConfigError, near_matches
from trl_moe_ext.experts.anatomy import Anatomy
from trl_moe_ext.tuners.selection.options import ALL
from trl_moe_ext.tuners.targets.options import TargetOptions

# Words for the projections of an MLP. They name Linears where there are some, and the routed experts' projections.
BOTH = {"gate_up", "down"}
EXPERT_WORDS = {
    "experts": BOTH,
    **{word: {"gate_up"} for word in ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3")},
    **{word: {"down"} for word in ("down_proj", "w2")},
}


def listed(config: TargetOptions) -> Collection[str]:
    """The words of `target_modules`; none if it is a regular expression."""
    return config.target_modules if isinstance(config.target_modules, (list, set, tuple)) else ()


def wants_experts(config: TargetOptions) -> bool:
    """Whether routed experts are asked for, by either option."""
    return "experts" in config.moe_target or any(word.rpartition(".")[2] in EXPERT_WORDS for word in listed(config))


def check(config: TargetOptions, candidates: Collection[str], anatomy: Anatomy) -> None:
    """Every word of `target_modules` must name something: a misspelt one would leave a part silently untrained.

    Args:
        candidates: names of the modules that can be adapted.
    """
    if isinstance(config.target_modules, str):
        if not any(re.fullmatch(config.target_modules, name) for name in candidates):
            raise ConfigError(
                f"target_modules={config.target_modules!r} is a regular expression, and no Linear's full name matches "
                f"it. To name modules by the end of their names give a list: [{config.target_modules!r}]"
            )
        return
    experts = (*anatomy.experts, *anatomy.other_experts, *anatomy.expert_linears.values())
    for word in config.target_modules:
        path, _, last = word.rpartition(".")
        if last in EXPERT_WORDS and any(f".{name}".endswith(f".{path}" if path else "") for name in experts):
            continue
        if not any(f".{name}".endswith(f".{word}") for name in (*candidates, *experts)):
            known = {name.rpartition(".")[2] for name in candidates}
            raise ConfigError(f"target_modules: no module to adapt is called {word!r}; {near_matches(word, known)}")


def check_effect(config: TargetOptions, is_dense: bool) -> None:
    """Refuse options of experts on a model without any."""
    of_experts = {
        **{name: getattr(config, name, None) for name in ("expert_r", "expert_alpha", "selected_experts")},
        "expert_projections": None if config.expert_projections == "both" else config.expert_projections,
        "expert_selection": None if config.expert_selection == ALL else config.expert_selection,
    }
    for option in (name for name, value in of_experts.items() if value is not None and is_dense):
        raise ConfigError(
            f"{option}={getattr(config, option)!r} has no effect: the model has no routed experts. Leave it out"
        )


def check_modules_to_save(config: TargetOptions, anatomy: Anatomy) -> None:
    """Refuse a full copy of routed experts."""
    for word in config.modules_to_save or []:
        held = [
            name
            for name in (*anatomy.experts, *anatomy.expert_linears.values())
            if re.match(rf"(^|.*\.){word}($|\..*)", name)
        ]
        if held:
            raise ConfigError(
                f"modules_to_save={word!r} holds routed experts ({held[0]}): a full copy of them would be trained and "
                "saved. Leave it out: the experts are adapted already"
            )


def nothing(config: TargetOptions, anatomy: Anatomy) -> str:
    """The message when no module is left to adapt."""
    parts = ("experts", "expert_linears", "attention", "shared_experts", "dense_mlp", "router")
    there = ", ".join(f"{part} {len(getattr(anatomy, part))}" for part in parts)
    return (
        f"nothing to adapt: moe_target={config.moe_target}, exclude_modules={config.exclude_modules}, "
        f"layers_to_transform={config.layers_to_transform} leave no module. The model has: {there}"
    )


def unread(anatomy: Anatomy, modules: dict[str, nn.Module], quantisation: object) -> str:
    """The message for experts whose layout is not known."""
    name = anatomy.unread_experts[0]
    if quantisation is not None:
        return (
            f"the experts in {name} ({type(modules[name]).__name__}) are quantised ({quantisation}) and cannot be "
            "adapted yet. Load the model in bfloat16, or use moe_target=['attention'] to train the rest"
        )
    shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in list(modules[name].named_parameters())[:4])
    return (
        f"the experts in {name} ({type(modules[name]).__name__}: {shapes}) are laid out in a way that is not known. "
        "Describe it in a plug-in (hook register_experts_families, see docs/families.md), use "
        "moe_target=['attention'] to train the rest, or peft_type lora"
    )
