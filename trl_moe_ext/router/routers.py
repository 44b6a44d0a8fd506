"""Find the routers of a model, whatever family it is of and whatever adapters are attached.

Each module of routed experts has a router. It is what transformers declares (`declared`), or what stands beside the
experts, is called router or gate and has a score for each of them (`experts.anatomy`). What is neither is an error,
but for two kinds of layers, which `routers_left_out` lists:

- hash layers, as the first of DeepSeek-V4, where a table picks the experts by the token's id;
- blocks that are called with the choice, as those of ViTPose, where the data set picks the expert.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts.anatomy import routers_beside
from trl_moe_ext.experts.finding import FoundExperts, ancestors, find_experts
from trl_moe_ext.router.declared import declared_routers
from trl_moe_ext.router.labels import short_labels
from trl_moe_ext.router.places import Place, read_places
from trl_moe_ext.router.router import Router
from trl_moe_ext.router.top_k import experts_per_token

__all__ = ["BY_CALLER", "BY_TOKEN_ID", "Router", "find_routers", "routers_left_out"]

BY_TOKEN_ID = "the token's id and not a learned router picks its experts"
BY_CALLER = "the block is called with the choice of experts"

# What can be done about a model whose routing cannot be read.
ADVICE = "Switch router losses and metrics off for this model, or report its family"

_CHOICE_NAME = re.compile(r"ind(ex|ices)|selected|chosen")


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of a model in the order of its layers; none for a dense model.

    Adapters that are attached later put other modules in their places: find the routers again then.

    Args:
        model: with or without adapters.

    Raises:
        LayoutError: a module of routed experts has no router that can be told, or not just one.
    """
    return _Survey(model).routers()


def routers_left_out(model: nn.Module) -> dict[str, str]:
    """Modules of routed experts without a router of their own -> the reason, `BY_TOKEN_ID` or `BY_CALLER`."""
    survey = _Survey(model)
    survey.routers()
    return survey.left_out


class _Survey:
    """One walk through a model: from its modules of experts to their routers."""

    def __init__(self, model: nn.Module) -> None:
        self.places: dict[str, Place] = read_places(model)
        self.modules = {name: place.module for name, place in self.places.items()}
        self.declared = declared_routers(self.modules)
        found = find_experts({name: module for name, module in self.modules.items() if name})
        self.sizes = _sizes(self.modules, found)
        self.layouts = {**found.stacks, **found.other_modality}
        self.beside = routers_beside(self.modules, self.sizes)
        self.left_out: dict[str, str] = {}

    def routers(self) -> list[Router]:
        sent_to: dict[str, list[str]] = {}  # router -> modules of experts
        for experts in (name for name in self.modules if name in self.sizes):
            router = self._router_of(experts)
            if router is not None:
                sent_to.setdefault(router, []).append(experts)
        self._check_declared(sent_to)
        # One that stands in several places is seen once each time it is called, whatever its name.
        first: dict[int, str] = {}
        for router in sent_to:
            name = first.setdefault(id(self.places[router].called), router)
            if name != router:
                sent_to[name] += sent_to[router]
        labels = short_labels([*first.values()])
        return [self._read(router, sent_to[router], labels[router]) for router in first.values()]

    def _router_of(self, experts: str) -> str | None:
        block = experts.rpartition(".")[0]
        if experts in self.declared:  # the experts are not a module of their own, but parts of the block
            return experts
        declared = [name for name in self.declared if name.rpartition(".")[0] == block]
        found = declared or self.beside[experts]
        reason = self._reason(block, found)
        if reason is not None:
            self.left_out[experts] = reason
            return None
        if len(found) != 1:
            there = ", ".join(f"{name} ({type(self.modules[name]).__name__})" for name in found) or "none"
            raise LayoutError(f"one router should stand beside the experts {experts!r}; found {there}. {ADVICE}")
        return found[0]

    def _reason(self, block: str, found: list[str]) -> str | None:
        """Why the experts of a block have no router, if they have none by design."""
        if found and all("input_ids" in _arguments(self.modules[name]) for name in found):
            return BY_TOKEN_ID
        takes_choice = any(_CHOICE_NAME.search(name) for name in _arguments(self.modules[block]))
        return BY_CALLER if not found and takes_choice else None

    def _check_declared(self, routers: Collection[str]) -> None:
        """Each declared module is a router, or holds one whose logits it passes on."""
        around = {*routers}.union(*(ancestors(name) for name in routers))
        unmatched = [name for name in self.declared if name not in around]
        if unmatched:
            raise LayoutError(
                f"transformers records the router logits of {unmatched[0]!r}, but no routed experts were found beside "
                f"it. {ADVICE}"
            )

    def _read(self, name: str, all_experts: Sequence[str], label: str) -> Router:
        router, experts = self.modules[name], all_experts[0]
        num_experts = self.sizes[experts]
        # Some routers have one logit more than there are experts, for tokens that skip them.
        classes = getattr(router, "num_router_classes", num_experts)
        return Router(
            name=name,
            module=self.places[name].called,
            num_experts=classes,
            top_k=self._top_k(name),
            experts=experts,
            label=label,
            logits_at=self.declared.get(name),
            experts_module=self.places[experts].called if experts != name else None,
            skip_class=num_experts if classes == num_experts + 1 else None,
            identity_experts=self.layouts[experts].identity_experts if experts in self.layouts else 0,
            all_experts=tuple(all_experts),
        )

    def _top_k(self, name: str) -> int:
        around = [self.modules[outer] for outer in ("", *ancestors(name))][::-1]
        router, block = self.modules[name], around[0]
        config = next((module.config for module in (router, *around) if hasattr(module, "config")), None)
        found = experts_per_token((router, block), config)
        if found is None:
            raise LayoutError(
                f"how many experts {name!r} ({type(router).__name__}) picks for a token is not known: neither it nor "
                f"its block has a top_k, nor its config a num_experts_per_tok. {ADVICE}"
            )
        return found


def _sizes(modules: Mapping[str, nn.Module], found: FoundExperts) -> dict[str, int]:
    """Modules of routed experts -> how many they hold, of all modalities."""
    stacks = {**found.stacks, **found.other_modality}
    sizes = {name: layout.num_experts + layout.identity_experts for name, layout in stacks.items()}
    for name in (*dict.fromkeys(found.linears.values()), *found.unread):
        module = modules[name]
        size = getattr(module, "num_experts", None)
        if not isinstance(size, int) and name in found.unread:
            raise LayoutError(f"how many experts {name!r} ({type(module).__name__}) holds is not known. {ADVICE}")
        sizes[name] = size if isinstance(size, int) else len(list(module.children()))
    return sizes


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)
