"""The rank of every trained expert: one for all, by `rank_pattern`, or by how much the data uses the expert."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from peft.utils.other import get_pattern_key
from torch import nn

from trl_moe_ext.errors import ConfigError, some_of
from trl_moe_ext.profiles.choose import ranks_by_share
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.patterns import ExpertPatterns
from trl_moe_ext.tuners.selection.resolve import expert_of, sizes_of_experts
from trl_moe_ext.tuners.targets.resolve import Targets, base_modules
from trl_moe_ext.tuners.targets.tied import TiedNames


def settle_ranks(config: MoeLoraConfig, targets: Targets, model: nn.Module) -> dict[str, int]:
    """Write the ranks of experts into `targets`, and into the config's `settled_ranks` what is to be saved of them.

    Args:
        config: of the adapter.
        targets: what the adapter takes from the model.
        model: with or without other adapters.

    Returns:
        `rank_pattern` without the entries of single experts, which PEFT would warn of: it knows no such modules.

    Raises:
        ConfigError: a rank is given to an expert that is not trained, modules that share their weights get different
            ranks, or ranks by share have no effect.
    """
    modules = dict(base_modules(model))
    sizes = sizes_of_experts(targets.anatomy, modules)
    trained = _trained_experts(targets, modules, sizes)
    _refuse_beyond(config.rank_pattern, sizes)
    patterns = ExpertPatterns(config.rank_pattern, sizes)
    for name, experts in trained.items():
        _refuse_untrained(patterns, name, experts, sizes[name])
    by_share = _by_share(config, targets, patterns, trained)
    patterns = ExpertPatterns(config.rank_pattern | by_share, sizes)
    ranks = {name: patterns.ranks(name, experts) for name, experts in trained.items()}
    # A file does not keep the order of the entries, by which one of two that name an expert counts.
    config.settled_ranks = {f"{name}.{expert}": rank for name in ranks for expert, rank in ranks[name].items()}
    for name in targets.experts:
        own = ranks[name]
        if own or len(trained[name]) < sizes[name]:
            rank = _rank_of_module(config, patterns, name)
            targets.expert_ranks[name] = {expert: own.get(expert, rank) for expert in trained[name]}
    for name in (name for name in targets.expert_linears if targets.anatomy.expert_linears[name] in sizes):
        container = targets.anatomy.expert_linears[name]
        expert = expert_of(modules, container, name)
        if expert in ranks[container]:
            targets.linear_ranks[name] = ranks[container][expert]
    _refuse_differing(config, targets, patterns, TiedNames({name: modules[name] for name in targets.experts}))
    return patterns.without_experts([*targets.experts, *targets.expert_linears, *targets.linears])


def _trained_experts(
    targets: Targets, modules: Mapping[str, nn.Module], sizes: Mapping[str, int]
) -> dict[str, list[int]]:
    """Modules of experts -> those of them that are trained, whether they are stacked or modules of their own."""
    selection = targets.selection or {}
    trained: dict[str, set[int]] = {name: {*selection.get(name, range(sizes[name]))} for name in targets.experts}
    for name in targets.expert_linears:
        container = targets.anatomy.expert_linears[name]
        if container in sizes:
            trained.setdefault(container, set()).add(expert_of(modules, container, name))
    return {name: sorted(experts) for name, experts in sorted(trained.items())}


def _by_share(
    config: MoeLoraConfig, targets: Targets, patterns: ExpertPatterns, trained: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """Entries of `rank_pattern` by use, for the trained experts that have none of their own.

    Those of a module share what its rank would give them. A saved adapter has such entries already.
    """
    if config.expert_rank != "by_share":
        return {}
    own = {name: patterns.ranks(name, experts) for name, experts in trained.items()}
    if targets.uses is None:
        if not any(own.values()):
            raise ConfigError(
                "expert_rank='by_share', and rank_pattern has no rank of an expert: the config was saved before it "
                "was used. Set saved_with=None to have its profile read"
            )
        return {}
    found: dict[str, int] = {}
    for name in (name for name in trained if name in targets.uses):
        shares = targets.uses[name].shares(config.expert_score)
        others = [expert for expert in trained[name] if expert not in own[name]]
        ranks = ranks_by_share(shares, others, _rank_of_module(config, patterns, name))
        found |= {f"{name}.{expert}": rank for expert, rank in ranks.items()}
    if not found:
        raise ConfigError(
            "expert_rank='by_share' has no effect: rank_pattern has a rank for every expert that is trained, or the "
            "profile has the use of none of them. Leave it out"
        )
    if len({*found.values()}) == 1:
        warnings.warn(
            "expert_rank='by_share' gives all experts the same rank: their use differs by less than its steps, which "
            "are powers of two",
            stacklevel=2,
        )
    unknown = sorted(trained.keys() - targets.uses.keys())
    if unknown:
        warnings.warn(f"the profile has no use of {some_of(unknown)}: no ranks by share there", stacklevel=2)
    return found


def _refuse_beyond(rank_pattern: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Raise ConfigError for an entry that names an expert which its module does not have."""
    last: dict[str, int] = {}  # ranks by share are an entry for each of thousands of experts, of few modules
    for key in rank_pattern:
        module, _, expert = key.rpartition(".")
        if module and expert.isdecimal():
            last[module] = max(last.get(module, 0), int(expert))
    for module, largest in last.items():
        for name in (name for name in sizes if f".{name}".endswith(f".{module}") and largest >= sizes[name]):
            raise ConfigError(
                f"rank_pattern names '{module}.{largest}', and {name!r} has {sizes[name]} experts (the first is 0)"
            )


def _refuse_untrained(patterns: ExpertPatterns, module: str, trained: Sequence[int], num_experts: int) -> None:
    """Raise ConfigError for an entry of which the module trains no expert that it names."""
    of_trained = {key for expert in trained for key in patterns.keys(module, expert)}
    for expert in sorted({*range(num_experts)} - {*trained}):
        for key in (key for key in patterns.keys(module, expert) if key not in of_trained):
            raise ConfigError(
                f"rank_pattern names expert {expert} of {module!r} ({key!r}), which is not selected; leave it out, or "
                "select the expert"
            )


def _refuse_differing(config: MoeLoraConfig, targets: Targets, patterns: ExpertPatterns, tied: TiedNames) -> None:
    """Raise ConfigError where `rank_pattern` gives one module of experts two ranks, under two of its names."""

    def ranks(name: str) -> object:
        return targets.expert_ranks.get(name) or _rank_of_module(config, patterns, name)

    for first in sorted(targets.experts):
        for name in sorted(tied.of([first])):
            if ranks(name) != ranks(first):
                raise ConfigError(
                    f"rank_pattern gives the experts of {first!r} and {name!r} different ranks, and they have the "
                    "same weights; give both the same"
                )


def _rank_of_module(config: MoeLoraConfig, patterns: ExpertPatterns, name: str) -> int:
    default = config.expert_r or config.r
    rank: int = config.rank_pattern.get(get_pattern_key(patterns.others, name), default)
    return rank
