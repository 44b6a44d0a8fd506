"""Find the routed experts of a model, in whatever form it keeps them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.experts.reading import read_block_parts, read_layout

OTHER_MODALITY = re.compile(r"(^|[._])(vision|visual|image|audio|speech|video)")
_OTHER_NAME = re.compile(r"shared|router|gate$", re.IGNORECASE)
_EXPERTS_NAME = re.compile(r"experts?($|_)|Experts?(?![a-z])")


@dataclass
class FoundExperts:
    """The routed experts of a model.

    Attributes:
        stacks: modules of experts that are kept in stacks, with their layouts.
        linears: Linears (and Embeddings) of experts that are modules of their own -> the module that holds all experts
            of the layer.
        other_modality: stacks in a tower, or for tokens, of another modality than the language model's.
        unread: modules that are called experts but whose layout is not known.
        parts: other parts of a model, such as ``router``, -> what plug-ins say belongs to them.
    """

    stacks: dict[str, ExpertsLayout] = field(default_factory=dict)
    linears: dict[str, str] = field(default_factory=dict)
    other_modality: dict[str, ExpertsLayout] = field(default_factory=dict)
    unread: list[str] = field(default_factory=list)
    parts: dict[str, list[str]] = field(default_factory=dict)

    @property
    def modules(self) -> set[str]:
        """Every module that holds the experts of a layer."""
        return {*self.stacks, *self.other_modality, *self.linears.values(), *self.unread}


def find_experts(modules: Mapping[str, nn.Module]) -> FoundExperts:
    """Stacks and what plug-ins tell first, then lists of single experts; what else is called experts is unread."""
    found = FoundExperts()
    for name, module in modules.items():
        layout = read_layout(module)
        if layout is not None:
            found.stacks[name] = layout
        for part, children in read_block_parts(module).items():
            full = [f"{name}.{child}" for child in children]
            if part == "experts":
                found.linears |= dict.fromkeys(full, name)
            else:
                found.parts.setdefault(part, []).extend(full)
    _find_single_experts(found, modules)
    _set_other_modalities_apart(found)
    return found


def ancestors(name: str) -> Iterator[str]:
    """Names of the modules around `name`, the outermost first."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts)))


def _find_single_experts(found: FoundExperts, modules: Mapping[str, nn.Module]) -> None:
    known = found.modules
    around = {ancestor for name in known for ancestor in ancestors(name)}
    contents: dict[str, dict[str, nn.Module]] = {}
    for name, module in modules.items():
        container = next((ancestor for ancestor in ancestors(name) if ancestor in contents), None)
        if container is not None:
            contents[container][name] = module
        elif (
            name not in known
            and name not in around
            and known.isdisjoint(ancestors(name))
            and _is_called_experts(name, module)
        ):
            contents[name] = {}
    for container, inside in contents.items():
        linears = [name for name, module in inside.items() if isinstance(module, nn.Linear)]
        rest = [modules[container], *(module for module in inside.values() if not isinstance(module, nn.Linear))]
        has_more = any(p.ndim >= 2 for module in rest for p in module.parameters(recurse=False))
        if linears and not has_more and isinstance(modules[container], (nn.ModuleList, nn.ModuleDict)):
            found.linears |= dict.fromkeys(linears, container)
        else:
            found.unread.append(container)


def _is_called_experts(name: str, module: nn.Module) -> bool:
    names = (name.rpartition(".")[2], type(module).__name__)
    is_called_experts = any(_EXPERTS_NAME.search(n) and not _OTHER_NAME.search(n) for n in names)
    return is_called_experts and any(p.ndim >= 2 for p in module.parameters()) and not isinstance(module, nn.Linear)


def _set_other_modalities_apart(found: FoundExperts) -> None:
    """A data set of texts would leave them untrained; in a model of that modality alone they are the experts."""
    if all(OTHER_MODALITY.search(name) for name in (*found.stacks, *found.linears)):
        return
    found.other_modality = {n: layout for n, layout in found.stacks.items() if OTHER_MODALITY.search(n)}
    found.stacks = {n: layout for n, layout in found.stacks.items() if n not in found.other_modality}
