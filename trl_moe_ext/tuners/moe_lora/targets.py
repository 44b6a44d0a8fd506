"""From the user's words to the modules that an adapter takes: resolved once, before anything is replaced."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _find_minimal_target_modules,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from trl_moe_ext.errors import ConfigError, LayoutError, near_matches
from trl_moe_ext.experts.anatomy import Anatomy, read_anatomy
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig

# Words for the projections of an MLP. They name Linears where there are some, and the routed experts' projections.
_BOTH = {"gate_up", "down"}
_EXPERT_WORDS = {
    "experts": _BOTH,
    **{word: {"gate_up"} for word in ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3")},
    **{word: {"down"} for word in ("down_proj", "w2")},
}


@dataclass
class Targets:
    """What one adapter takes from one model.

    Attributes:
        experts: modules of routed experts -> which of their projections, ``gate_up``, ``down`` or both.
        routers: names of routers that are Linears.
        linears: other Linears, in PEFT's terms: a set of suffixes, or a regular expression of the user's.
        parameters: bare parameters that PEFT wraps itself (a router's weight), as suffixes.
        is_dense: the model has no routed experts.
        anatomy: the parts of the model, for the summary.
    """

    experts: dict[str, set[str]] = field(default_factory=dict)
    routers: set[str] = field(default_factory=set)
    linears: set[str] | str = field(default_factory=set)
    parameters: list[str] = field(default_factory=list)
    is_dense: bool = False
    anatomy: Anatomy = field(default_factory=Anatomy)


def resolve_targets(config: MoeLoraConfig, model: nn.Module) -> Targets:
    """Find what `config` asks for in `model`.

    Raises:
        ConfigError: a word matches nothing, or nothing at all would be adapted.
        LayoutError: the model has experts that cannot be read: they would stay untrained.
    """
    modules = dict(base_modules(model))
    anatomy = read_anatomy(modules.items())
    if anatomy.unread_experts and _wants_experts(config):
        raise LayoutError(_unread(anatomy, modules, getattr(model, "quantization_method", None)))
    _check_modules_to_save(config, anatomy)
    targets = Targets(is_dense=not anatomy.experts, anatomy=anatomy)
    _take_parameters(targets, config, modules)
    _take_experts(targets, config)
    if config.target_modules:
        _check_words(config, modules, anatomy)
        targets.linears = config.target_modules
    else:
        linears = [name for part in _parts(config, targets) for name in getattr(anatomy, part)]
        targets.linears = _suffixes([name for name in linears if _selected(config, name)], modules, targets.is_dense)
    if "router" in config.moe_target:
        targets.routers = {name for name in anatomy.router if _selected(config, name)}
        targets.parameters += [
            name for name in anatomy.router_parameters if _selected(config, name.rpartition(".")[0])
        ]
    if not (targets.experts or targets.routers or targets.linears or targets.parameters):
        raise ConfigError(_nothing(config, anatomy))
    return targets


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of `model` as if no adapter were attached: wrappers are looked through."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or name.startswith(inside or "\0"):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (name + ".",)
            yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        else:
            yield name, module


def _wants_experts(config: MoeLoraConfig) -> bool:
    return "experts" in config.moe_target or any(word.rpartition(".")[2] in _EXPERT_WORDS for word in _words(config))


def _words(config: MoeLoraConfig) -> Collection[str]:
    return config.target_modules if isinstance(config.target_modules, (list, set, tuple)) else ()


def _take_experts(targets: Targets, config: MoeLoraConfig) -> None:
    """Add the experts that `moe_target` and the words of `target_modules` name, unless `target_parameters` chose."""
    allowed = _BOTH if config.expert_projections == "both" else {config.expert_projections}
    if "experts" in config.moe_target and not targets.experts:
        _add_experts(targets, config, "", allowed)
    for word in _words(config):
        path, _, last = word.rpartition(".")
        if last in _EXPERT_WORDS:
            # `gate_proj` and `experts.down_proj` name a projection of all, `layers.1.mlp.experts` one module. A path
            # that leads elsewhere, as in `shared_experts.down_proj`, names no routed experts.
            _add_experts(targets, config, word if last == "experts" and path else path, _EXPERT_WORDS[last] & allowed)


def _add_experts(targets: Targets, config: MoeLoraConfig, path: str, projections: set[str]) -> None:
    """Add `projections` of every selected module of experts whose name ends with `path`, of all if it is empty."""
    for name in targets.anatomy.experts:
        if projections and (not path or f".{name}".endswith(f".{path}")) and _selected(config, name):
            targets.experts.setdefault(name, set()).update(projections)


def _parts(config: MoeLoraConfig, targets: Targets) -> list[str]:
    parts = [word for word in config.moe_target if word in ("attention", "shared_experts", "dense_mlp")]
    if targets.is_dense and "experts" in config.moe_target and "dense_mlp" not in parts:
        parts.append("dense_mlp")
    return parts


def _selected(config: MoeLoraConfig, name: str) -> bool:
    """Whether `exclude_modules`, `modules_to_save`, `layers_to_transform` and `layers_pattern` leave `name` in."""
    probe = copy.copy(config)
    # PEFT applies the layer options only to names matched by their suffix.
    probe.target_modules = {name.rpartition(".")[2]}
    return bool(check_target_module_exists(probe, name))


def _suffixes(names: list[str], modules: dict[str, nn.Module], is_dense: bool) -> set[str]:
    """The shortest suffixes that name these modules and no other, and that are no words for routed experts.

    They are saved as `target_modules`: a bare ``gate_proj`` would bring the experts in when the adapter is loaded.
    """
    if not names:
        return set()
    others = [name for name in modules if name not in set(names)]
    suffixes: set[str] = set(_find_minimal_target_modules(names, others))
    for word in set() if is_dense else suffixes & _EXPERT_WORDS.keys():
        suffixes.remove(word)
        for name in (name for name in names if name.endswith(f".{word}")):
            longer = ".".join(name.split(".")[-2:])
            suffixes.add(name if any(other.endswith(f".{longer}") for other in others) else longer)
    return suffixes


def _take_parameters(targets: Targets, config: MoeLoraConfig, modules: dict[str, nn.Module]) -> None:
    """Split `target_parameters` into stacks of experts, which take the grouped path, and the rest, which is PEFT's."""
    for target in config.target_parameters or []:
        owners = [
            (name, word)
            for name, layout in targets.anatomy.experts.items()
            for word, projection in (("gate_up", layout.up), ("down", layout.down))
            if f".{name}.{projection.name}".endswith(f".{target}")
        ]
        for name, word in owners:
            if _selected(config, name):
                targets.experts.setdefault(name, set()).add(word)
        if owners:
            continue
        known = [f"{name}.{p}" for name, m in modules.items() for p, _ in m.named_parameters(recurse=False)]
        if not any(f".{name}".endswith(f".{target}") for name in known):
            last = {name.rpartition(".")[2] for name in known}
            raise ConfigError(f"target_parameters: no parameter is called {target!r}; {near_matches(target, last)}")
        targets.parameters.append(target)


def _check_words(config: MoeLoraConfig, modules: dict[str, nn.Module], anatomy: Anatomy) -> None:
    """Every word of `target_modules` must name something: a misspelt one would leave a part silently untrained."""
    if isinstance(config.target_modules, str):
        return  # a regular expression or "all-linear": PEFT checks that it matches
    for word in config.target_modules:
        if word == INCLUDE_LINEAR_LAYERS_SHORTHAND or any(n == word or n.endswith(f".{word}") for n in modules):
            continue
        if anatomy.experts and word.rpartition(".")[2] in _EXPERT_WORDS:
            continue
        linears = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)}
        raise ConfigError(f"target_modules: no module is called {word!r}; {near_matches(word, linears)}")


def _check_modules_to_save(config: MoeLoraConfig, anatomy: Anatomy) -> None:
    for word in config.modules_to_save or []:
        held = [name for name in anatomy.experts if re.match(rf"(^|.*\.){word}($|\..*)", name)]
        if held:
            raise ConfigError(
                f"modules_to_save={word!r} holds routed experts ({held[0]}): a full copy of them would be trained and "
                "saved. Leave it out: the experts are adapted by moe_lora"
            )


def _nothing(config: MoeLoraConfig, anatomy: Anatomy) -> str:
    parts = ("experts", "attention", "shared_experts", "dense_mlp", "router", "router_parameters")
    there = ", ".join(f"{part} {len(getattr(anatomy, part))}" for part in parts)
    return (
        f"nothing to adapt: moe_target={config.moe_target}, exclude_modules={config.exclude_modules}, "
        f"layers_to_transform={config.layers_to_transform} leave no module. The model has: {there}"
    )


def _unread(anatomy: Anatomy, modules: dict[str, nn.Module], quantisation: object) -> str:
    name = anatomy.unread_experts[0]
    if quantisation is not None:
        return (
            f"the experts in {name} ({type(modules[name]).__name__}) are quantised ({quantisation}) and cannot be "
            "adapted yet. Load the model in bfloat16, or use moe_target=['attention'] to train the rest"
        )
    shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in list(modules[name].named_parameters())[:4])
    return (
        f"the experts in {name} ({type(modules[name]).__name__}: {shapes}) do not follow transformers' experts "
        "interface and cannot be adapted yet. Use moe_target=['attention'] to train the rest, or peft_type lora"
    )
