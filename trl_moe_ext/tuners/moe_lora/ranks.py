"""The rank of every trained expert: one for all, by `rank_pattern`, or by how much the data uses the expert."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from peft.utils.other import get_pattern_key
from torch import nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.selection.resolve import expert_of, patterns_by_share, read_profile, sizes_of_experts
from trl_moe_ext.tuners.targets.resolve import Targets, base_modules


class ExpertPatterns:
    """The entries of a `rank_pattern` that name experts, such as ``layers.3.mlp.experts.17``.

    A model has thousands of experts, and ranks by share an entry for each: full names are looked up, and only what is
    none is tried as PEFT tries it, as a regular expression for the end of a name.

    Args:
        patterns: `rank_pattern`.
        sizes: modules of experts -> how many they hold.
    """

    def __init__(self, patterns: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        names = {f"{module}.{expert}" for module, size in sizes.items() for expert in range(size)}
        self._patterns = patterns
        self._exact = patterns.keys() & names
        self.others = {key: re.compile(rf"(.*\.)?({key})$") for key in patterns if key not in self._exact}
        self._used = set(self._exact)

    def key(self, module: str, expert: int) -> str | None:
        """The entry that names an expert; what is no full name comes first."""
        name = f"{module}.{expert}"
        key = next((key for key, regex in self.others.items() if regex.match(name)), None)
        if key is not None:
            self._used.add(key)
            return key
        return name if name in self._exact else None

    def ranks(self, module: str, experts: Sequence[int]) -> dict[int, int]:
        """Those of `experts` that have a rank of their own."""
        return {e: self._patterns[key] for e in experts if (key := self.key(module, e)) is not None}

    def without_experts(self, modules: Sequence[str]) -> dict[str, int]:
        """The entries that name no expert, or one of `modules` as well."""
        return {
            key: rank
            for key, rank in self._patterns.items()
            if key not in self._used or (key in self.others and any(map(self.others[key].match, modules)))
        }


def settle_ranks(config: MoeLoraConfig, targets: Targets, model: nn.Module) -> dict[str, int]:
    """Write the ranks of experts into `targets`, and those by share into the config's `rank_pattern` before.

    Args:
        config: of the adapter. Once it was saved, or used, its `rank_pattern` has the ranks.
        targets: what the adapter takes from the model.
        model: with or without other adapters.

    Returns:
        `rank_pattern` without the entries of single experts, which PEFT would warn of: it knows no such modules.

    Raises:
        ConfigError: the profile is of another model, or an expert that is not trained has a rank.
    """
    modules = dict(base_modules(model))
    sizes = sizes_of_experts(targets.anatomy, modules)
    patterns = ExpertPatterns(config.rank_pattern, sizes)
    if config.expert_rank == "by_share" and config.saved_with is None and not hasattr(config, "resolved"):
        profile = read_profile(config, model)
        assert profile is not None, "the config has checked that there is one"
        trained = {*targets.experts, *(targets.anatomy.expert_linears[name] for name in targets.expert_linears)}
        ranks = {name: _rank_of_module(config, patterns, name) for name in sorted(trained)}
        by_share = patterns_by_share(profile, config.expert_score, ranks, targets.selection)
        config.rank_pattern = {**config.rank_pattern, **by_share}
        patterns = ExpertPatterns(config.rank_pattern, sizes)
    for name in targets.experts:
        experts = None if targets.selection is None else targets.selection.get(name)
        found = _ranks_of_module(patterns, name, experts, sizes[name], _rank_of_module(config, patterns, name))
        if found is not None:
            targets.expert_ranks[name] = found
    for name in targets.expert_linears:
        container = targets.anatomy.expert_linears[name]
        if container in sizes:
            expert = expert_of(modules, container, name)
            own = patterns.ranks(container, [expert])
            if own:
                targets.linear_ranks[name] = own[expert]
    return patterns.without_experts([*targets.experts, *targets.expert_linears, *targets.linears])


def _ranks_of_module(
    patterns: ExpertPatterns, module: str, experts: Sequence[int] | None, num_experts: int, rank: int
) -> dict[int, int] | None:
    """The rank of each trained expert of a module; None if all experts are trained with `rank`."""
    own = patterns.ranks(module, range(num_experts))
    if experts is None:
        return {expert: own.get(expert, rank) for expert in range(num_experts)} if own else None
    keys = {expert: patterns.key(module, expert) for expert in own}
    of_trained = {keys[expert] for expert in experts if expert in keys}
    for expert in own.keys() - {*experts}:
        if keys[expert] not in of_trained:
            raise ConfigError(
                f"rank_pattern names expert {expert} of {module!r} ({keys[expert]!r}), which is not selected; leave "
                "it out, or select the expert"
            )
    return {expert: own.get(expert, rank) for expert in experts}


def _rank_of_module(config: MoeLoraConfig, patterns: ExpertPatterns, name: str) -> int:
    default = config.expert_r or config.r
    rank: int = config.rank_pattern.get(get_pattern_key(patterns.others, name), default)
    return rank
