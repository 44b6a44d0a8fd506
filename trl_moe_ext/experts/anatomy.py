"""The parts of a model around its routed experts: attention, shared experts, dense MLPs, routers.

Parts are told by structure: the class or attribute name that transformers gives to attention, a module's place beside
the experts, the shape of a router's weight. No model is named.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from trl_moe_ext.experts.layout import ExpertsLayout, read_layout

NamedModules = Iterable[tuple[str, nn.Module]]

# An indexer's scores only choose positions: no gradient reaches its Linears, and LoRA there would never be trained.
_NOT_TRAINED = re.compile(r"(^|[._])indexer([._]|$)")
_ATTENTION_NAME = re.compile(r"(^|_)(attn|attention)($|_)")
_ATTENTION_CLASS = re.compile(r"Attention(?!Layer|Block)")
_OTHER_MODALITY = re.compile(r"(^|[._])(vision|visual|image|audio|speech|video)")
_ROUTER_NAME = re.compile(r"(^|_)router($|_)|(^|_)gate$")
_SHARED_NAME = re.compile(r"shared")
_EXPERTS_NAME = re.compile(r"experts?($|_)|Experts?(?![a-z])")
_MLP_NAME = re.compile(
    r"(^|_)(mlp|ffn|feed_forward|fc1|fc2|gate_proj|up_proj|down_proj|dense_h_to_4h|dense_4h_to_h)($|_)"
)


@dataclass
class Anatomy:
    """Names of the adaptable parts of a model.

    Attributes:
        experts: modules of routed experts, with their layouts.
        unread_experts: modules that are called experts but whose layout is not known.
        attention, shared_experts, dense_mlp: names of Linears.
        router: names of router Linears, and of bare router parameters (``module.parameter``) in `router_parameters`.
    """

    experts: dict[str, ExpertsLayout] = field(default_factory=dict)
    unread_experts: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    shared_experts: list[str] = field(default_factory=list)
    dense_mlp: list[str] = field(default_factory=list)
    router: list[str] = field(default_factory=list)
    router_parameters: list[str] = field(default_factory=list)


def read_anatomy(named_modules: NamedModules) -> Anatomy:
    """Sort the modules of a model into its parts.

    Args:
        named_modules: name and module of the model without adapters, parents before children.
    """
    modules = dict(named_modules)
    anatomy = Anatomy()
    for name, module in modules.items():
        layout = read_layout(module)
        if layout is not None:
            anatomy.experts[name] = layout
    for name, module in modules.items():
        if _is_unread(name, module) and not _inside(name, (*anatomy.experts, *anatomy.unread_experts)):
            anatomy.unread_experts.append(name)
    routers = _routers(modules, anatomy.experts)
    taken = (*routers, *anatomy.experts, *anatomy.unread_experts)
    stacks = {_stack(experts) for experts in (*anatomy.experts, *anatomy.unread_experts)}
    for name, module in modules.items():
        if name in routers:
            _add_router(anatomy, name, modules)
        elif isinstance(module, nn.Linear) and not _inside(name, taken) and _in_language_model(name, stacks):
            part = _part_of_linear(name, modules)
            if part is not None:
                getattr(anatomy, part).append(name)
    return anatomy


def _is_unread(name: str, module: nn.Module) -> bool:
    names = (name.rpartition(".")[2], type(module).__name__)
    is_called_experts = any(_EXPERTS_NAME.search(n) and not _SHARED_NAME.search(n.lower()) for n in names)
    holds_weights = any(parameter.ndim >= 2 for parameter in module.parameters())
    return is_called_experts and holds_weights and read_layout(module) is None and not isinstance(module, nn.Linear)


def _in_language_model(name: str, stacks: set[str]) -> bool:
    """Whether `name` stands in one of the stacks of layers with experts; in a dense model, not in another modality.

    The tower of another modality is no part of what a user of a language model means by attention, and a data set of
    texts would leave it untrained.
    """
    return _stack(name) in stacks if stacks else not _OTHER_MODALITY.search(name)


def _stack(name: str) -> str:
    """The list of layers that a module stands in: what comes before the first number of its name."""
    return re.split(r"(?:^|\.)\d+\.", name, maxsplit=1)[0]


def _part_of_linear(name: str, modules: dict[str, nn.Module]) -> str | None:
    if _NOT_TRAINED.search(name):
        return None
    ancestors = _ancestors(name)
    for ancestor in ancestors:
        attribute = ancestor.rpartition(".")[2]
        is_class = ancestor in modules and _ATTENTION_CLASS.search(type(modules[ancestor]).__name__)
        if is_class or _ATTENTION_NAME.search(attribute):
            return "attention"
    attributes = name.split(".")
    if any(_SHARED_NAME.search(attribute) for attribute in attributes):
        # The gate of a shared expert has one output: a weight for the expert, not a projection.
        return None if attributes[-1].endswith("gate") else "shared_experts"
    if any(_ROUTER_NAME.search(attribute) for attribute in attributes):
        return None  # a router beside experts that cannot be read
    if any(_MLP_NAME.search(attribute) for attribute in attributes):
        return "dense_mlp"
    return None


def _routers(modules: dict[str, nn.Module], experts: dict[str, ExpertsLayout]) -> set[str]:
    """Modules beside the experts that are called router or gate and hold a matrix with a row for each expert."""
    children = defaultdict(list)
    for name in modules:
        children[name.rpartition(".")[0]].append(name)
    found = set()
    for experts_name, layout in experts.items():
        for sibling in children[experts_name.rpartition(".")[0]]:
            attribute = sibling.rpartition(".")[2]
            if _ROUTER_NAME.search(attribute) and not _SHARED_NAME.search(attribute):
                shapes = [p.shape for p in modules[sibling].parameters()]
                if any(len(shape) == 2 and layout.num_experts in shape for shape in shapes):
                    found.add(sibling)
    return found


def _add_router(anatomy: Anatomy, name: str, modules: dict[str, nn.Module]) -> None:
    for child_name, child in modules.items():
        if child_name != name and not _inside(child_name, (name,)):
            continue
        if isinstance(child, nn.Linear):
            anatomy.router.append(child_name)
        else:
            for parameter_name, parameter in child.named_parameters(recurse=False):
                if parameter.ndim == 2 and min(parameter.shape) > 1:
                    anatomy.router_parameters.append(f"{child_name}.{parameter_name}")


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _inside(name: str, containers: Iterable[str]) -> bool:
    return any(name.startswith(container + ".") for container in containers)
