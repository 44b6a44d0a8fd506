"""From the user's words to the modules that an adapter takes: resolved once, before anything is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from trl_moe_ext.errors import ConfigError, LayoutError
from trl_moe_ext.experts.anatomy import Anatomy, read_anatomy
from trl_moe_ext.experts.layout import check_dtypes
from trl_moe_ext.experts.probe import check_reading
from trl_moe_ext.tuners.selection.profiled import Uses, read_uses, refuse_nested
from trl_moe_ext.tuners.selection.resolve import Selection, is_trained, selected_experts, tell_of_unchosen
from trl_moe_ext.tuners.targets import words
from trl_moe_ext.tuners.targets.blocks import check_block
from trl_moe_ext.tuners.targets.options import TargetOptions
from trl_moe_ext.tuners.targets.resolver import Resolver
from trl_moe_ext.tuners.targets.tied import TiedNames


@dataclass
class Targets:
    """What one adapter takes from one model.

    Attributes:
        experts: modules of stacked experts -> names of the projections that are adapted.
        expert_linears: Linears (and Embeddings) of experts that are modules of their own.
        linears: all other Linears, routers included.
        parameters: bare parameters that PEFT wraps itself (a router's weight), as suffixes.
        words: what the saved config says in `target_modules`: the user's own words, or suffixes that name `linears`.
        excluded: modules that hold a projection that `exclude_modules` left out.
        selection: modules of experts -> those that are trained; None if all are.
        uses: modules of experts -> how much each expert was used; None without a profile that decides.
        expert_ranks: modules of stacked experts -> expert -> rank, where they are not all trained with the same one.
        linear_ranks: Linears of experts -> rank, where it is not that of all.
        module_ranks: the entries of `rank_pattern` that are for modules, which PEFT looks up.
        router_bias: modules of stacked experts -> size of the bias that their router gets.
        is_dense: the model has no routed experts.
        anatomy: the parts of the model, for the summary.
    """

    experts: dict[str, set[str]] = field(default_factory=dict)
    expert_linears: set[str] = field(default_factory=set)
    linears: set[str] = field(default_factory=set)
    parameters: list[str] = field(default_factory=list)
    words: set[str] | str = field(default_factory=set)
    excluded: set[str] = field(default_factory=set)
    selection: Selection | None = None
    uses: Uses | None = None
    expert_ranks: dict[str, dict[int, int]] = field(default_factory=dict)
    linear_ranks: dict[str, int] = field(default_factory=dict)
    module_ranks: dict[str, int] = field(default_factory=dict)
    router_bias: dict[str, int] = field(default_factory=dict)
    is_dense: bool = False
    anatomy: Anatomy = field(default_factory=Anatomy)

    def __contains__(self, name: str) -> bool:
        return name in self.experts or name in self.expert_linears or name in self.linears


def resolve_targets(config: TargetOptions, model: Any) -> Targets:
    """Find what `config` asks for in `model`.

    Raises:
        ConfigError: a word matches nothing, or nothing at all would be adapted.
        LayoutError: the model has experts that cannot be read or adapted: they would stay untrained.
    """
    refuse_nested(config, model)
    modules = dict(base_modules(model))
    anatomy = read_anatomy(modules.items())
    if anatomy.unread_experts and words.wants_experts(config):
        raise LayoutError(words.unread(anatomy, modules, getattr(model, "quantization_method", None)))
    words.check_modules_to_save(config, anatomy)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    resolver = Resolver(config, modules, anatomy, head)
    experts, expert_linears = resolver.experts()
    linears, saved, bare = resolver.linears()
    tied = TiedNames(modules)
    uses = read_uses(config, model, tied)
    selection = selected_experts(config, uses, anatomy, modules, tied)
    expert_linears |= linears & anatomy.expert_linears.keys()
    expert_linears = {name for name in expert_linears if is_trained(selection, anatomy, modules, name)}
    targets = Targets(
        experts={name: projections for first, projections in experts.items() for name in tied.of([first])},
        expert_linears=tied.of(expert_linears),
        linears=tied.of(linears - anatomy.expert_linears.keys()),
        parameters=[*resolver.other_parameters(), *bare],
        words=saved,
        excluded=resolver.excluded,
        selection=selection,
        uses=uses,
        is_dense=resolver.is_dense,
        anatomy=anatomy,
    )
    if not (targets.experts or targets.expert_linears or targets.linears or targets.parameters):
        raise ConfigError(words.nothing(config, anatomy))
    for name in targets.experts:
        # Before anything is replaced: a refusal leaves the model as it was.
        layout = anatomy.layouts[name]
        check_dtypes(modules[name], layout)
        check_reading(modules[name], layout)
        check_block(modules.get(name.rpartition(".")[0], model), layout)
    if targets.selection is not None and getattr(config, "saved_with", None) is None:
        adapted = {*targets.experts} | {anatomy.expert_linears[name] for name in expert_linears}
        tell_of_unchosen(config, adapted, targets.selection)
    return targets


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of `model` as if no adapter were attached: wrappers are looked through.

    A module that stands in several places has several names.
    """
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or name.startswith(inside or "\0"):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            inside += (name + ".",)
            yield name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
        else:
            yield name, module
