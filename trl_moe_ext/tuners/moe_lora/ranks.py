"""The rank of every trained expert: one for all, by `rank_pattern`, or by how much the data uses the expert."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from peft.utils.other import get_pattern_key
from torch import nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.selection.resolve import (
    expert_of,
    pattern_of_expert,
    patterns_by_share,
    ranks_of_experts,
    read_profile,
)
from trl_moe_ext.tuners.targets.resolve import Targets, base_modules


def settle_ranks(config: MoeLoraConfig, targets: Targets, model: nn.Module) -> None:
    """Write the ranks of experts into `targets`, and those by share into the config's `rank_pattern` before.

    Args:
        config: of the adapter. Once it was saved, its `rank_pattern` has the ranks.
        targets: what the adapter takes from the model.
        model: with or without other adapters.

    Raises:
        ConfigError: the profile is of another model.
    """
    modules = dict(base_modules(model))
    if config.expert_rank == "by_share" and config.saved_with is None:
        profile = read_profile(config, model)
        assert profile is not None, "the config has checked that there is one"
        ranks = {name: _rank_of_module(config, name) for layer in profile.layers for name in layer.experts}
        trained = {*targets.experts, *(targets.anatomy.expert_linears[name] for name in targets.expert_linears)}
        by_share = patterns_by_share(
            profile, config.expert_score, {n: r for n, r in ranks.items() if n in trained}, targets.selection
        )
        # What the user wrote stands first, where it is found first.
        config.rank_pattern = {**config.rank_pattern, **by_share}
    layouts = targets.anatomy.experts | targets.anatomy.other_experts
    for name in targets.experts:
        experts = None if targets.selection is None else targets.selection.get(name)
        if experts is not None:
            _refuse_ranks_of_others(config.rank_pattern, name, experts, layouts[name].num_experts)
        found = ranks_of_experts(
            config.rank_pattern, name, experts, _rank_of_module(config, name), layouts[name].num_experts
        )
        if found is not None:
            targets.expert_ranks[name] = found
    for name in targets.expert_linears:
        container = targets.anatomy.expert_linears[name]
        key = _pattern_of_linear(config.rank_pattern, modules, container, name)
        if key is not None:
            targets.linear_ranks[name] = config.rank_pattern[key]


def patterns_of_modules(config: MoeLoraConfig, targets: Targets) -> dict[str, int]:
    """`rank_pattern` without the entries of single experts, which PEFT would warn of: it knows no such modules."""
    names = [*targets.experts, *targets.expert_linears, *targets.linears]
    is_of_expert = targets.expert_ranks.keys() | targets.linear_ranks.keys()
    return {
        key: rank
        for key, rank in config.rank_pattern.items()
        if not is_of_expert or any(re.match(rf"(.*\.)?({key})$", name) for name in names)
    }


def _refuse_ranks_of_others(
    patterns: Mapping[str, int], module: str, experts: Sequence[int], num_experts: int
) -> None:
    """A rank that somebody wrote for an expert that is not trained."""
    for expert in {*range(num_experts)} - {*experts}:
        key = pattern_of_expert(patterns, module, expert)
        if key is not None and not any(pattern_of_expert({key: 1}, module, trained) for trained in experts):
            raise ConfigError(
                f"rank_pattern names expert {expert} of {module!r} ({key!r}), which is not selected; leave it out, or "
                "select the expert"
            )


def _rank_of_module(config: MoeLoraConfig, name: str) -> int:
    default = config.expert_r or config.r
    rank: int = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), default)
    return rank


def _pattern_of_linear(
    patterns: Mapping[str, int], modules: Mapping[str, nn.Module], container: str, name: str
) -> str | None:
    if not isinstance(modules[container], nn.ModuleList | nn.ModuleDict):
        return None
    return pattern_of_expert(patterns, container, expert_of(modules, container, name))
