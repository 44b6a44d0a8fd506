"""The parts of a model around its routed experts: attention, shared experts, dense MLPs, routers.

Parts are told by structure: the class or attribute name that transformers gives to attention, a module's place beside
the experts, the shape of a router's weight. No model is named.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from trl_moe_ext.experts.finding import OTHER_MODALITY, FoundExperts, ancestors, find_experts
from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.experts.registry import PARTS

NamedModules = Iterable[tuple[str, nn.Module]]

# An indexer's scores only choose positions: no gradient reaches its Linears, and LoRA there would never be trained.
_NOT_TRAINED = re.compile(r"(^|[._])indexer([._]|$)")
_ATTENTION_NAME = re.compile(r"(^|_)(attn|attention)($|_)")
_ATTENTION_CLASS = re.compile(r"Attention(?!Layer|Block)")
_ROUTER_NAME = re.compile(r"(^|_)router($|_)|^gate$")
_SHARED_NAME = re.compile(r"shared")
_MLP_NAME = re.compile(
    r"(^|_)(mlp|ffn|feed_forward|fc1|fc2|gate_proj|up_proj|down_proj|dense_h_to_4h|dense_4h_to_h)($|_)"
)
# Encoder and decoder are two branches of one language model.
_BRANCH = re.compile(r"(^|\.)(encoder|decoder)$")
_DOWN_NAME = re.compile(r"(^|_)(down|w2|wo|fc2|out|output|c_proj)(_|$)")


@dataclass
class Anatomy:
    """Names of the adaptable parts of a model.

    Attributes:
        experts, expert_linears, other_experts, unread_experts: what `find_experts` found.
        attention, shared_experts, dense_mlp, router: names of Linears.
        parameters: those four parts -> names (``module.parameter``) of matrices that are not the weight of an ordinary
            Linear: a router that multiplies by itself, a Linear with a forward of its own, shared experts in stacks.
        untrained: Linears that no gradient reaches: LoRA there would stay at zero.
        stacks: the lists of layers that hold experts, such as ``model.layers``.
    """

    experts: dict[str, ExpertsLayout] = field(default_factory=dict)
    expert_linears: dict[str, str] = field(default_factory=dict)
    other_experts: dict[str, ExpertsLayout] = field(default_factory=dict)
    unread_experts: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    shared_experts: list[str] = field(default_factory=list)
    dense_mlp: list[str] = field(default_factory=list)
    router: list[str] = field(default_factory=list)
    parameters: dict[str, list[str]] = field(default_factory=lambda: {part: [] for part in PARTS})
    untrained: list[str] = field(default_factory=list)
    stacks: set[str] = field(default_factory=set)

    @property
    def layouts(self) -> dict[str, ExpertsLayout]:
        """Every module of stacked experts, those of other modalities too."""
        return self.experts | self.other_experts

    def in_language_model(self, name: str) -> bool:
        """Whether a module is part of what holds the stacks of layers, and not of another modality.

        The tower of another modality is no part of what a user of a language model means by attention, and a data set
        of texts would leave it untrained.
        """
        if OTHER_MODALITY.search(name) and not all(OTHER_MODALITY.search(stack) for stack in self.stacks or [""]):
            return False
        roots = {_BRANCH.sub("", stack.rpartition(".")[0]) for stack in self.stacks}
        return not roots or any(not root or name.startswith(root + ".") for root in roots)

    def add(self, part: str, name: str, module: nn.Module) -> None:
        """Add a Linear to its part, as a module if PEFT's LoRA can take its place, else as a parameter."""
        if _is_ordinary(module) or part == "untrained":
            getattr(self, part).append(name)
        else:
            self.parameters[part].append(f"{name}.weight")


def read_anatomy(named_modules: NamedModules) -> Anatomy:
    """Sort the modules of a model into its parts.

    Args:
        named_modules: name and module of the model without adapters, parents before children.
    """
    modules = dict(named_modules)
    found = find_experts(modules)
    anatomy = Anatomy(found.stacks, found.linears, found.other_modality, found.unread)
    routers = _routers(modules, found)
    told = {name: part for part, names in found.parts.items() for name in names if part != "router"}
    containers = found.modules
    anatomy.stacks = {_stack(name) for name in (*found.stacks, *found.linears, *found.unread)}
    for name, module in modules.items():
        around = {*ancestors(name)}
        if name in routers or not routers.isdisjoint(around):
            _add_router(anatomy, name, module)
        elif _SHARED_NAME.search(name.rpartition(".")[2]) and anatomy.in_language_model(name):
            own = module.named_parameters(recurse=False)
            anatomy.parameters["shared_experts"] += [f"{name}.{stack}" for stack, p in own if p.ndim == 3]
        elif isinstance(module, nn.Linear) and name not in found.linears and anatomy.in_language_model(name):
            is_of_experts = not containers.isdisjoint(around) and name not in told
            part = told.get(name) or (None if is_of_experts else _part_of_linear(name, modules))
            if part is not None:
                anatomy.add(part, name, module)
    return anatomy


def is_down_projection(name: str) -> bool:
    """Whether the last part of a module's name says that it is the second projection of an MLP."""
    return _DOWN_NAME.search(name.rpartition(".")[2]) is not None


def _is_ordinary(module: nn.Module) -> bool:
    """Whether a Linear is called as one. Those that a model defines itself may return anything."""
    return type(module).forward is nn.Linear.forward or "modeling_" not in type(module).__module__


def _stack(name: str) -> str:
    """The list of layers that a module stands in: what comes before the first number of its name."""
    return re.split(r"(?:^|\.)\d+\.", name, maxsplit=1)[0]


def _part_of_linear(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    if _NOT_TRAINED.search(name):
        return "untrained"
    for ancestor in ancestors(name):
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


def routers_beside(modules: Mapping[str, nn.Module], sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Modules beside the experts that are called router or gate and hold a matrix as large as one score an expert.

    Args:
        modules: of a model, by name.
        sizes: modules of experts -> how many they hold.

    Returns:
        Modules of experts -> names of the routers beside them, which may be none.
    """
    children = defaultdict(list)
    for name in modules:
        children[name.rpartition(".")[0]].append(name)
    return {
        experts: [
            sibling
            for sibling in children[experts.rpartition(".")[0]]
            if _is_called_router(sibling.rpartition(".")[2]) and _has_scores(modules[sibling], num_experts)
        ]
        for experts, num_experts in sizes.items()
    }


def _routers(modules: Mapping[str, nn.Module], found: FoundExperts) -> set[str]:
    sizes = {name: layout.num_experts + layout.identity_experts for name, layout in found.stacks.items()}
    sizes |= {name: len(list(modules[name].children())) for name in found.linears.values()}
    return {*found.parts.get("router", ())}.union(*routers_beside(modules, sizes).values())


def _is_called_router(attribute: str) -> bool:
    return _ROUTER_NAME.search(attribute) is not None and not _SHARED_NAME.search(attribute)


def _has_scores(module: nn.Module, num_experts: int) -> bool:
    shapes = [p.shape for p in module.parameters()]
    return any(len(shape) == 2 and max(shape) >= num_experts for shape in shapes)


def _add_router(anatomy: Anatomy, name: str, module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        anatomy.add("router", name, module)
        return
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 2 and min(parameter.shape) > 1:
            anatomy.parameters["router"].append(f"{name}.{parameter_name}")
