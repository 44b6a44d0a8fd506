"""From the user's words to the modules that an adapter takes: resolved once, before anything is replaced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _find_minimal_target_modules,
    check_target_module_exists,
)
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from trl_moe_ext.errors import ConfigError, LayoutError, near_matches
from trl_moe_ext.experts.anatomy import Anatomy, is_down_projection, read_anatomy
from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.tuners.moe_lora import words
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.words import BOTH, EXPERT_WORDS


@dataclass
class Targets:
    """What one adapter takes from one model.

    Attributes:
        experts: modules of stacked experts -> which of their projections, ``gate_up``, ``down`` or both.
        expert_linears: Linears (and Embeddings) of experts that are modules of their own.
        linears: all other Linears, routers included.
        parameters: bare parameters that PEFT wraps itself (a router's weight), as suffixes.
        words: what the saved config says in `target_modules`: the user's own words, or suffixes that name `linears`.
        is_dense: the model has no routed experts.
        anatomy: the parts of the model, for the summary.
    """

    experts: dict[str, set[str]] = field(default_factory=dict)
    expert_linears: set[str] = field(default_factory=set)
    linears: set[str] = field(default_factory=set)
    parameters: list[str] = field(default_factory=list)
    words: set[str] | str = field(default_factory=set)
    is_dense: bool = False
    anatomy: Anatomy = field(default_factory=Anatomy)

    def __contains__(self, name: str) -> bool:
        return name in self.experts or name in self.expert_linears or name in self.linears


def resolve_targets(config: MoeLoraConfig, model: nn.Module) -> Targets:
    """Find what `config` asks for in `model`.

    Raises:
        ConfigError: a word matches nothing, or nothing at all would be adapted.
        LayoutError: the model has experts that cannot be read: they would stay untrained.
    """
    modules = dict(base_modules(model))
    anatomy = read_anatomy(modules.items())
    if anatomy.unread_experts and words.wants_experts(config):
        raise LayoutError(words.unread(anatomy, modules, getattr(model, "quantization_method", None)))
    words.check_modules_to_save(config, anatomy)
    targets = Targets(is_dense=not (anatomy.experts or anatomy.expert_linears), anatomy=anatomy)
    _take_parameters(targets, config, modules)
    _take_experts(targets, config)
    _take_linears(targets, config, modules, model)
    if not (targets.experts or targets.expert_linears or targets.linears or targets.parameters):
        raise ConfigError(words.nothing(config, anatomy))
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


def _take_experts(targets: Targets, config: MoeLoraConfig) -> None:
    """Add the experts that `moe_target` and the words of `target_modules` name, unless `target_parameters` chose."""
    allowed = BOTH if config.expert_projections == "both" else {config.expert_projections}
    if "experts" in config.moe_target and not targets.experts:
        _add_experts(targets, config, "", allowed)
    for word in words.listed(config):
        path, _, last = word.rpartition(".")
        if last in EXPERT_WORDS:
            # `gate_proj` and `experts.down_proj` name a projection of all, `layers.1.mlp.experts` one module. A path
            # that leads elsewhere, as in `shared_experts.down_proj`, names no routed experts.
            _add_experts(targets, config, word if last == "experts" and path else path, EXPERT_WORDS[last] & allowed)


def _add_experts(targets: Targets, config: MoeLoraConfig, path: str, projections: set[str]) -> None:
    """Add `projections` of every selected module of experts whose name ends with `path`, of all if it is empty."""
    anatomy = targets.anatomy
    # Experts of another modality are adapted if they are named, as its attention is.
    for name, layout in (anatomy.experts | anatomy.other_experts if path else anatomy.experts).items():
        own = projections & _projections(name, layout)
        if own and (not path or f".{name}".endswith(f".{path}")) and _selected(config, name, "experts"):
            targets.experts.setdefault(name, set()).update(own)
    for name, container in anatomy.expert_linears.items():
        is_wanted = ("down" if is_down_projection(name) else "gate_up") in projections
        is_named = not path or f".{container}".endswith(f".{path}")
        if is_wanted and is_named and _selected(config, container, "experts") and _selected(config, name):
            targets.expert_linears.add(name)


def _projections(name: str, layout: ExpertsLayout) -> set[str]:
    """The user's words for what is in a module of experts; where it is a single projection, its name tells."""
    if layout.takes_rows:
        return {"down" if is_down_projection(name) else "gate_up"}
    return {projection.word for projection in layout.projections}


def _take_linears(targets: Targets, config: MoeLoraConfig, modules: dict[str, nn.Module], model: Any) -> None:
    anatomy = targets.anatomy
    parts = [word for word in config.moe_target if word == "router"]
    if config.target_modules in (ALL_LINEAR, {ALL_LINEAR}):
        names = _all_linears(anatomy, modules, model)
    elif config.target_modules:
        words.check(config, modules, anatomy)
        containers = {*anatomy.experts, *anatomy.expert_linears.values()}
        names = [n for n in modules if check_target_module_exists(config, n) and not _is_around(n, containers)]
    else:
        parts = [word for word in config.moe_target if word != "experts"]
        if targets.is_dense and "experts" in config.moe_target and "dense_mlp" not in parts:
            parts.append("dense_mlp")
        names = [name for part in parts if part != "router" for name in getattr(anatomy, part)]
    chosen = {name for name in names if _selected(config, name)}
    targets.expert_linears |= chosen & anatomy.expert_linears.keys()
    targets.linears = chosen - anatomy.expert_linears.keys()
    is_named = config.target_modules and config.target_modules not in (ALL_LINEAR, {ALL_LINEAR})
    targets.words = (
        config.target_modules if is_named else _suffixes(sorted(targets.linears), modules, targets.is_dense)
    )
    targets.linears |= {n for n in anatomy.router if "router" in parts and _selected(config, n)}
    bare = [name for part in parts for name in anatomy.parameters[part]]
    targets.parameters += [name for name in bare if _selected(config, name.rpartition(".")[0])]


def _is_around(name: str, containers: set[str]) -> bool:
    """Whether `name` is a module of experts or holds one: no Linear, though a word may end like its name."""
    return any(container == name or container.startswith(name + ".") for container in containers)


def _all_linears(anatomy: Anatomy, modules: dict[str, nn.Module], model: Any) -> list[str]:
    """Every Linear of the language model that a gradient reaches, but for the output layer, routers and experts."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    left_out = {*anatomy.router, *anatomy.expert_linears, *anatomy.untrained}
    left_out |= {name.rpartition(".")[0] for names in anatomy.parameters.values() for name in names}
    return [
        name
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and name not in left_out
        and anatomy.in_language_model(name)
    ]


def _selected(config: MoeLoraConfig, name: str, part: str = "") -> bool:
    """Whether `exclude_modules`, `modules_to_save`, `layers_to_transform` and `layers_pattern` leave `name` in."""
    if part and isinstance(config.exclude_modules, (list, set, tuple)) and part in config.exclude_modules:
        return False
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
    for word in set() if is_dense else suffixes & EXPERT_WORDS.keys():
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
            for projection in layout.projections
            if f".{name}.{projection.parameter}".endswith(f".{target}")
            for word in (_projections(name, layout) if layout.takes_rows else {projection.word})
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
