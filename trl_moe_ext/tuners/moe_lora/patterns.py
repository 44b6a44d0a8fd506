"""Entries of `rank_pattern` that name single experts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence


class ExpertPatterns:
    """The entries of a `rank_pattern` that name experts, such as ``layers.3.mlp.experts.17``.

    A model has thousands of experts, and ranks by share an entry for each: full names are looked up, and only what is
    none is tried as PEFT tries it, as a regular expression for the end of a name. A full name counts before all
    others, and of those the first.

    Args:
        patterns: `rank_pattern`.
        sizes: modules of experts -> how many they hold.
    """

    def __init__(self, patterns: Mapping[str, int], sizes: Mapping[str, int]) -> None:
        names = {f"{module}.{expert}" for module, size in sizes.items() for expert in range(size)}
        self._patterns = patterns
        self._exact = patterns.keys() & names
        self.others = {key: re.compile(rf"(.*\.)?({key})$") for key in patterns if key not in self._exact}
        self._used: set[str] = set()

    def keys(self, module: str, expert: int) -> list[str]:
        """The entries that name an expert; the first one counts."""
        name = f"{module}.{expert}"
        keys = [name] if name in self._exact else []
        keys += [key for key, regex in self.others.items() if regex.match(name)]
        self._used.update(keys)
        return keys

    def ranks(self, module: str, experts: Sequence[int]) -> dict[int, int]:
        """Those of `experts` that have a rank of their own."""
        return {expert: self._patterns[keys[0]] for expert in experts if (keys := self.keys(module, expert))}

    def without_experts(self, modules: Sequence[str]) -> dict[str, int]:
        """The entries that name no expert that was looked up, or one of `modules` as well."""
        return {
            key: rank
            for key, rank in self._patterns.items()
            if key not in self._used or (key in self.others and any(map(self.others[key].match, modules)))
        }
