"""One block of routed experts: the modules of experts that share a router, and what one token uses of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from trl_moe_ext.experts.anatomy import Anatomy
from trl_moe_ext.experts.finding import ancestors
from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.reporting.inspection.layout_words import read_from, singles_in_words, stacks_in_words
from trl_moe_ext.reporting.inspection.router import RouterKind, router_kind
from trl_moe_ext.router.top_k import experts_per_token

Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Experts:
    """A module of experts: how many there are, their parameters, and how they are laid out, in words."""

    num_experts: int | None
    identity_experts: int
    parameters: tuple[nn.Parameter, ...]
    expert_size: int
    layout: tuple[str, ...]
    read_from: str


@dataclass(frozen=True)
class Block:
    """A block, its modules of experts by name, its router and how many experts that chooses."""

    name: str
    experts: dict[str, Experts]
    router: RouterKind | None
    top_k: int | None


def find_blocks(modules: Modules, anatomy: Anatomy) -> list[Block]:
    """Every block of routed experts that can be read, in the order of the model.

    Args:
        modules: name -> module of the model without adapters.
        anatomy: of the model.
    """
    members: dict[str, dict[str, Experts]] = {}
    for name, layout in anatomy.layouts.items():
        members.setdefault(name.rpartition(".")[0], {})[name] = _stacked(modules[name], layout)
    for name in dict.fromkeys(anatomy.expert_linears.values()):
        # A list of experts stands in the block; what a plug-in tells the parts of is the block.
        is_list = isinstance(modules[name], (nn.ModuleList, nn.ModuleDict))
        block = name.rpartition(".")[0] if is_list else name
        linears = [linear for linear, container in anatomy.expert_linears.items() if container == name]
        members.setdefault(block, {})[name] = _single(modules, name, linears)
    positions = {name: position for position, name in enumerate(modules)}
    return [_block(name, members[name], modules, anatomy) for name in sorted(members, key=positions.__getitem__)]


def _stacked(module: nn.Module, layout: ExpertsLayout) -> Experts:
    biases = sum(p.out_features for p in layout.projections if p.bias)
    return Experts(
        layout.num_experts,
        layout.identity_experts,
        tuple(module.parameters()),
        sum(p.in_features * p.out_features for p in layout.projections) + biases,
        tuple(stacks_in_words(module, layout)),
        read_from(module),
    )


def _single(modules: Modules, container: str, linears: list[str]) -> Experts:
    """Experts that are modules of their own: the children of a list, or as many as the block says."""
    module = modules[container]
    parameters = tuple(p for linear in linears for p in modules[linear].parameters())
    num_experts: int | None
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        num_experts = len({linear.removeprefix(f"{container}.").partition(".")[0] for linear in linears})
    else:
        num_experts = getattr(module, "num_experts", None)
    size = sum(p.numel() for p in parameters) // num_experts if num_experts else 0
    words = singles_in_words(modules[linear] for linear in linears)
    return Experts(num_experts, 0, parameters, size, tuple(words), read_from(module))


def _block(name: str, experts: dict[str, Experts], modules: Modules, anatomy: Anatomy) -> Block:
    router = _router(name, modules, anatomy)
    around = [modules[each] for each in ("", *ancestors(name), name) if hasattr(modules.get(each), "config")]
    config = around[-1].config if around else None
    kind = router_kind(router, modules[name], config) if router is not None else None
    return Block(name, experts, kind, experts_per_token(filter(None, (router, modules[name])), config))


def _router(block: str, modules: Modules, anatomy: Anatomy) -> nn.Module | None:
    """The child of the block that is the router or holds its weights, else the one that is called router or gate."""
    prefix = f"{block}." if block else ""
    weights = [*anatomy.router, *(name.rpartition(".")[0] for name in anatomy.parameters["router"])]
    inside = [name.removeprefix(prefix).partition(".")[0] for name in weights if name.startswith(prefix)]
    children = dict(modules[block].named_children())
    # A router with rows for shared experts too is not one that can be adapted, but it is the router.
    found = dict.fromkeys(inside or [name for name in children if name in ("router", "gate")])
    return children.get(next(iter(found))) if len(found) == 1 else None
