"""Which experts, Linears and parameters the words of a config name in one model."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND as ALL_LINEAR
from torch import nn
from transformers.pytorch_utils import Conv1D

from trl_moe_ext.errors import ConfigError, near_matches
from trl_moe_ext.experts.anatomy import Anatomy, is_down_projection
from trl_moe_ext.tuners.targets import words
from trl_moe_ext.tuners.targets.exclusions import ends_with, keeps, keeps_experts, keeps_projection, word_of
from trl_moe_ext.tuners.targets.options import TargetOptions
from trl_moe_ext.tuners.targets.words import BOTH, EXPERT_WORDS


class Resolver:
    """Looks words up.

    Args:
        config: of the adapter.
        modules: name -> module of the model as if no adapter were attached.
        anatomy: its parts.
        head: its output layer.

    Attributes:
        excluded: modules that hold a projection that `exclude_modules` left out.
    """

    def __init__(
        self, config: TargetOptions, modules: Mapping[str, nn.Module], anatomy: Anatomy, head: nn.Module | None
    ) -> None:
        self.config = config
        self.modules = modules
        self.anatomy = anatomy
        self.head = head
        self.excluded: set[str] = set()
        self.is_dense = not (anatomy.experts or anatomy.expert_linears)
        # Of every modality: experts of another one are adapted if they are named, as its attention is.
        self._layouts = anatomy.layouts
        self._stacks: dict[str, set[str]] = {}
        self._linears: set[str] = set()
        # Module -> its bare matrix, for what PEFT's layers cannot take the place of.
        self._bare = {name.rpartition(".")[0]: name for names in anatomy.parameters.values() for name in names}
        words.check_effect(config, self.is_dense)

    def experts(self) -> tuple[dict[str, set[str]], set[str]]:
        """Stacks -> names of their projections, and Linears of single experts.

        `target_parameters` that name stacks choose exactly those, in place of the default of `moe_target`.
        """
        self._take_stacks_by_parameter()
        allowed = BOTH if self.config.expert_projections == "both" else {self.config.expert_projections}
        if "experts" in self.config.moe_target and not self._stacks:
            self._add("", allowed)
        for word in words.listed(self.config):
            path, _, last = word.rpartition(".")
            if last in EXPERT_WORDS and not (path and last != "experts" and self._names_others(word)):
                # `gate_proj` and `experts.down_proj` name a projection of all, `layers.1.mlp.experts` one module. A
                # path that leads elsewhere, as in `shared_experts.down_proj`, names no routed experts.
                self._add(word if last == "experts" and path else path, EXPERT_WORDS[last] & allowed)
            elif any(ends_with(name, word) for name in self.anatomy.experts):
                self._add(word, allowed)
        return self._stacks, self._linears

    def _names_others(self, word: str) -> bool:
        """Whether a word names modules beside the experts: ``mlp.up_proj`` in a block that holds experts as well."""
        return any(ends_with(name, word) for name in self.modules if name not in self.anatomy.expert_linears)

    def _add(self, path: str, wanted: set[str]) -> None:
        """Add the projections of every module of experts whose name ends with `path`, of all if it is empty."""
        anatomy = self.anatomy
        for name, layout in (self._layouts if path else anatomy.experts).items():
            if ends_with(name, path) and keeps_experts(self.config, name):
                for projection in layout.projections:
                    if word_of(name, layout, projection) in wanted:
                        self._add_projection(name, projection.name)
        for name, container in anatomy.expert_linears.items():
            is_wanted = ("down" if is_down_projection(name) else "gate_up") in wanted
            is_kept = keeps_experts(self.config, container) and keeps(self.config, name)
            if is_wanted and is_kept and ends_with(container, path):
                self._linears.add(name)

    def _add_projection(self, name: str, projection_name: str) -> None:
        layout = self._layouts[name]
        [projection] = [p for p in layout.projections if p.name == projection_name]
        if keeps_projection(self.config, name, layout, projection):
            self._stacks.setdefault(name, set()).add(projection_name)
        else:
            self.excluded.add(name.rpartition(".")[0])

    def _owners(self, target: str) -> list[tuple[str, str]]:
        """Modules of experts and their projections that one of the `target_parameters` names."""
        return [
            (name, projection.name)
            for name, layout in self._layouts.items()
            for projection in layout.projections
            if f".{name}.{projection.parameter}".endswith(f".{target}")
        ]

    def _take_stacks_by_parameter(self) -> None:
        for target in self.config.target_parameters or []:
            owners = self._owners(target)
            if owners and self.config.expert_projections != "both":
                raise ConfigError(
                    f"expert_projections={self.config.expert_projections!r} has no effect beside target_parameters="
                    f"{target!r}, which names projections of experts itself. Leave one of them out"
                )
            for name, projection in owners:
                if keeps_experts(self.config, name):
                    self._add_projection(name, projection)

    def other_parameters(self) -> list[str]:
        """The `target_parameters` that name no experts: PEFT's own wrapper adapts them."""
        others = [target for target in self.config.target_parameters or [] if not self._owners(target)]
        known = [f"{name}.{p}" for name, m in self.modules.items() for p, _ in m.named_parameters(recurse=False)]
        for target in others:
            if not any(f".{name}".endswith(f".{target}") for name in known):
                last = {name.rpartition(".")[2] for name in known}
                raise ConfigError(
                    f"target_parameters: no parameter is called {target!r}; {near_matches(target, last)}"
                )
        return others

    def linears(self) -> tuple[set[str], set[str] | str, list[str]]:
        """Names of Linears, how the saved config shall name them, and bare parameters."""
        parts = {word for word in self.config.moe_target if word != "experts"}
        parts |= {"dense_mlp"} if self.is_dense and "experts" in self.config.moe_target else set()
        named = self.config.target_modules
        if named in (ALL_LINEAR, {ALL_LINEAR}):
            chosen = self._all_linears()
        elif named:
            chosen = self._named()
        else:
            chosen = {name for part in parts - {"router"} for name in self._part(part)}
        parts &= {"router"}
        saved = {name for name in chosen - self._bare.keys() if keeps(self.config, name)}
        chosen |= {name for part in parts for name in self._part(part)}
        chosen = {name for name in chosen if keeps(self.config, name)}
        bare = sorted(self._bare[name] for name in chosen & self._bare.keys())
        if isinstance(named, str) and named != ALL_LINEAR:
            return chosen - self._bare.keys(), named, bare
        is_users = bool(named) and named not in (ALL_LINEAR, {ALL_LINEAR})
        # A word for bare matrices alone is saved in `target_parameters`: PEFT would warn that it matches no module.
        is_bare = {word: {name in self._bare for name in chosen if ends_with(name, word)} for word in named or ()}
        kept = {word for word, found in is_bare.items() if found != {True}}
        return chosen - self._bare.keys(), kept if is_users else self._suffixes(saved), bare

    def _part(self, part: str) -> list[str]:
        bare = [name.rpartition(".")[0] for name in self.anatomy.parameters[part]]
        return [*getattr(self.anatomy, part), *bare]

    def _named(self) -> set[str]:
        """What the user's words or regular expression name; each of them must name something."""
        candidates = [name for name, module in self.modules.items() if self._is_adaptable(name, module)]
        words.check(self.config, candidates, self.anatomy)
        return {name for name in candidates if check_target_module_exists(self.config, name)}

    def _is_adaptable(self, name: str, module: nn.Module) -> bool:
        is_leaf = not any(True for _ in module.children())
        has_weights = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
        taken = name in self._layouts or name in self.anatomy.untrained
        return is_leaf and has_weights and not taken

    def _all_linears(self) -> set[str]:
        """Every Linear of the language model that a gradient reaches, but for output layer, routers and experts."""
        bare_routers = {name.rpartition(".")[0] for name in self.anatomy.parameters["router"]}
        left_out = {*self.anatomy.router, *self.anatomy.expert_linears, *self.anatomy.untrained, *bare_routers}
        return {
            name
            for name, module in self.modules.items()
            if isinstance(module, (nn.Linear, Conv1D))
            and module is not self.head
            and name not in left_out
            and self.anatomy.in_language_model(name)
        }

    def _suffixes(self, names: set[str]) -> set[str]:
        """The shortest suffixes that name these modules and no other, and that are no words for routed experts.

        They are saved as `target_modules`: a bare ``gate_proj`` would bring the experts in when the adapter is loaded.
        """
        if not names:
            return set()
        others = [name for name in self.modules if name not in names]
        suffixes: set[str] = set(_find_minimal_target_modules(sorted(names), others))
        for word in set() if self.is_dense else suffixes & EXPERT_WORDS.keys():
            suffixes.remove(word)
            for name in (name for name in sorted(names) if name.endswith(f".{word}")):
                longer = ".".join(name.split(".")[-2:])
                suffixes.add(name if any(other.endswith(f".{longer}") for other in others) else longer)
        return suffixes
