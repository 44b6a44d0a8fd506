"""What the selection of a config means for one model: which experts of which modules are trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Set

from torch import nn

from trl_moe_ext.errors import ConfigError, near_matches, some_of
from trl_moe_ext.experts.anatomy import Anatomy
from trl_moe_ext.tuners.selection.options import ExpertSelectionOptions
from trl_moe_ext.tuners.selection.profiled import Uses, chosen_experts
from trl_moe_ext.tuners.targets.tied import TiedNames

Selection = dict[str, tuple[int, ...]]


def selected_experts(
    config: ExpertSelectionOptions,
    uses: Uses | None,
    anatomy: Anatomy,
    modules: Mapping[str, nn.Module],
    tied: TiedNames,
) -> Selection | None:
    """Of each module of experts those that `config` chooses, in ascending order; None if it leaves none out.

    Args:
        config: of the adapter.
        uses: what the profile says that decides, if one does.
        anatomy: parts of the model.
        modules: name -> module of the model as if no adapter were attached.
        tied: which of them share their weights, and so the choice.

    Raises:
        ConfigError: a module or an expert is named that there is not, the choice contradicts itself or the profile, or
            the experts of this model cannot be told apart.
    """
    if config.selected_experts is None and uses is None:
        return None
    _refuse_rows(anatomy, modules)
    sizes = sizes_of_experts(anatomy, modules)
    given = None if config.selected_experts is None else _of_tied(_checked(config.selected_experts, sizes), tied)
    if uses is None or not config.says_how_many:  # a profile without a number is for ranks
        return given
    chosen = _checked({name: chosen_experts(config, use) for name, use in uses.items()}, sizes)
    if given is not None and given != chosen:
        raise ConfigError(_contradiction(config, given, chosen))
    if all(len(experts) == sizes[name] for name, experts in chosen.items()):
        warnings.warn("the selection leaves no expert out: all of them are trained", stacklevel=2)
    return chosen


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
    sizes = {name: layout.num_experts for name, layout in anatomy.layouts.items()}
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


def _of_tied(selection: Selection, tied: TiedNames) -> Selection:
    """The same for all names of modules that share their weights."""
    found: Selection = {}
    for first, experts in selection.items():
        for name in tied.of([first]):
            other = selection.get(name, experts)
            if other != experts:
                raise ConfigError(
                    f"selected_experts says {[*experts]} of {first!r} and {[*other]} of {name!r}, which have the same "
                    "weights; say the same of both, or name one of them"
                )
            found[name] = experts
    return found


def _contradiction(config: ExpertSelectionOptions, given: Selection, chosen: Selection) -> str:
    """The message for a choice that is not the profile's, with the first module of which they differ."""
    name = next(name for name in sorted({*given, *chosen}) if given.get(name) != chosen.get(name))
    said, by_profile = (
        f"{[*choice[name]]} of {name!r}" if name in choice else f"nothing of {name!r}" for choice in (given, chosen)
    )
    return (
        f"selected_experts says {said}, and the profile {config.profile_path} says {by_profile}. An earlier use of "
        "the config may have written it, with other options or another profile: set selected_experts=None to let the "
        "profile choose; to keep the choice leave the profile and its options out"
    )


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
