"""What the selection of a config means for one model: which experts are trained, with which rank."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Set

from torch import nn

from trl_moe_ext.errors import ConfigError, near_matches, some_of
from trl_moe_ext.experts.anatomy import Anatomy
from trl_moe_ext.profiles.choose import by_coverage, by_number, ranks_by_share
from trl_moe_ext.profiles.match import check_profile
from trl_moe_ext.profiles.profile import ExpertProfile, LayerUse
from trl_moe_ext.tuners.selection.options import ExpertSelectionOptions

Selection = dict[str, tuple[int, ...]]


def selected_experts(
    config: ExpertSelectionOptions, model: nn.Module, anatomy: Anatomy, modules: Mapping[str, nn.Module]
) -> Selection | None:
    """Of each module of experts those that `config` chooses, in ascending order; None if it leaves none out.

    Args:
        config: of the adapter.
        model: with or without other adapters.
        anatomy: its parts.
        modules: name -> module of the model as if no adapter were attached.

    Raises:
        ConfigError: the profile is of another model, a module or an expert is named that there is not, or the experts
            of this model cannot be told apart.
    """
    says_how_many = config.expert_coverage is not None or config.experts_per_layer is not None
    if config.selected_experts is None and not says_how_many:
        return None  # a profile without a number is for ranks
    _refuse_rows(anatomy, modules)
    sizes = sizes_of_experts(anatomy, modules)
    if config.selected_experts is not None:
        return _checked(config.selected_experts, sizes)
    profile = read_profile(config, model)
    assert profile is not None, "the config has checked that there is one"
    chosen = {name: _choose(config, layer) for layer in profile.layers for name in layer.experts}
    if all(len(experts) == sizes[name] for name, experts in chosen.items() if name in sizes):
        warnings.warn("the selection leaves no expert out: all of them are trained", stacklevel=2)
    return _checked(chosen, sizes)


def read_profile(config: ExpertSelectionOptions, model: nn.Module) -> ExpertProfile | None:
    """The profile that `config` names, if it names one; raises ConfigError if it is not of this model."""
    if config.profile_path is None:
        return None
    profile = ExpertProfile.load(config.profile_path)
    check_profile(profile, model)
    return profile


def patterns_by_share(
    profile: ExpertProfile, score: str, ranks: Mapping[str, int], selection: Selection | None
) -> dict[str, int]:
    """Entries of `rank_pattern` that give the experts of each module ranks by their use.

    Args:
        profile: of the model.
        score: what use is measured by.
        ranks: modules of experts -> their mean rank.
        selection: the experts that are trained; None for all.
    """
    patterns: dict[str, int] = {}
    for layer in profile.layers:
        for name in (name for name in layer.experts if name in ranks):
            experts = range(layer.num_experts) if selection is None else selection[name]
            found = ranks_by_share(layer.shares(score), experts, ranks[name])
            patterns |= {f"{name}.{expert}": rank for expert, rank in found.items()}
    return patterns


def is_trained(selection: Selection | None, anatomy: Anatomy, modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether a Linear of an expert that is a module of its own belongs to one that is trained."""
    container = anatomy.expert_linears[name]
    return (
        selection is None or container not in selection or expert_of(modules, container, name) in selection[container]
    )


def expert_of(modules: Mapping[str, nn.Module], container: str, name: str) -> int:
    """The index of the expert that a Linear inside a list of experts belongs to."""
    child = name[len(container) + 1 :].partition(".")[0]
    return [each for each, _ in modules[container].named_children()].index(child)


def sizes_of_experts(anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Modules of experts -> how many they hold; those that are rows of larger matrices are left out."""
    stacks = anatomy.experts | anatomy.other_experts
    sizes = {name: layout.num_experts for name, layout in stacks.items()}
    for name in {*anatomy.expert_linears.values()}:
        if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            sizes[name] = len(list(modules[name].children()))
    return sizes


def _refuse_rows(anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> None:
    for name in {*anatomy.expert_linears.values()}:
        if not isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            raise ConfigError(
                f"the experts of {name!r} ({type(modules[name]).__name__}) are rows of larger matrices and cannot be "
                "selected one by one; use expert_selection='all'"
            )


def _choose(config: ExpertSelectionOptions, layer: LayerUse) -> tuple[int, ...]:
    shares = layer.shares(config.expert_score)
    if config.experts_per_layer is not None:
        return by_number(shares, config.experts_per_layer)
    assert config.expert_coverage is not None
    return by_coverage(shares, config.expert_coverage)


def _checked(selected: Mapping[str, Sequence[int]], sizes: Mapping[str, int]) -> Selection:
    for name, experts in selected.items():
        if name not in sizes:
            raise ConfigError(
                f"experts of {name!r} are selected, and the model has no such experts; {near_matches(name, sizes)}"
            )
        if max(experts) >= sizes[name]:
            raise ConfigError(
                f"expert {max(experts)} of {name!r} is selected, which has {sizes[name]} (the first is 0)"
            )
    return {name: tuple(sorted(experts)) for name, experts in selected.items()}


def tell_of_unchosen(config: ExpertSelectionOptions, adapted: Set[str], selection: Selection) -> None:
    """Warn of what a selection does not do: modules that it does not name, and names that nothing is adapted of.

    Args:
        config: of the adapter.
        adapted: modules of experts that are.
        selection: modules of experts -> those that are chosen.
    """
    unchosen, unadapted = sorted(adapted - selection.keys()), sorted(selection.keys() - adapted)
    if unchosen:
        warnings.warn(
            f"no experts are chosen of {some_of(unchosen)}: all of them are trained there. To leave them frozen use "
            "exclude_modules",
            stacklevel=2,
        )
    if unadapted and config.profile_path is None:
        warnings.warn(f"experts are chosen of {some_of(unadapted)}, which is not adapted: no effect", stacklevel=2)
