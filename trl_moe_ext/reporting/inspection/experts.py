"""The routed experts of a model, blocks of a kind together: where, how many, how they are stored and routed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from trl_moe_ext.experts.anatomy import Anatomy
from trl_moe_ext.reporting.inspection.blocks import Block, Experts, Modules, find_blocks
from trl_moe_ext.reporting.inspection.router import RouterKind

# The list of layers, the layer's index in it, and the path inside the layer.
_LAYER = re.compile(r"(?:(.*?)\.)?(\d+)\.(.*)")
_SHARED = re.compile(r"shared?_|_shared")


@dataclass(frozen=True)
class RoutedExperts:
    """Blocks of routed experts that differ in nothing but the layer and the number of experts.

    Attributes:
        stack: name of the list of layers that they are in.
        stack_layers: its length.
        layers: indices of the layers with these experts.
        modules: paths of the modules of experts inside a layer.
        class_names: of these modules.
        num_experts: experts a layer; several values if layers differ, none if it is not known.
        identity_experts: further choices of the router that return the token unchanged.
        top_k: experts chosen for a token; several values if layers differ, none if it is not known.
        shared_experts: paths of the experts in the same layers that every token is sent to.
        router: None if the block has none that can be told.
        layout: how the weights are stored and run, in words.
        read_from: what told the layout.
        other_modality: they are for tokens that are no text, and not adapted unless they are named.
        parameters: of all these experts; tied weights count once.
        active_parameters: of those that one token is sent to; None if `top_k` is not known.
    """

    stack: str
    stack_layers: int
    layers: list[int]
    modules: list[str]
    class_names: list[str]
    num_experts: list[int]
    identity_experts: int
    top_k: list[int]
    shared_experts: list[str]
    router: RouterKind | None
    layout: list[str]
    read_from: str
    other_modality: bool
    parameters: int
    active_parameters: int | None


def routed_experts(modules: Modules, anatomy: Anatomy) -> list[RoutedExperts]:
    """The routed experts that can be read, blocks that are alike as one.

    Args:
        modules: name -> module of the model without adapters, the model itself as ``""``.
        anatomy: of the model.
    """
    groups: dict[tuple[object, ...], list[Block]] = {}
    for block in find_blocks(modules, anatomy):
        stack, _, _ = split_layer(block.name)
        paths = tuple(_path(name) for name in block.experts)
        classes = tuple(type(modules[name]) for name in block.experts)
        looks = tuple((e.layout, e.read_from, e.identity_experts) for e in block.experts.values())
        is_other = not anatomy.other_experts.keys().isdisjoint(block.experts)
        groups.setdefault((stack, paths, classes, looks, block.router, is_other), []).append(block)
    counted: set[int] = set()
    return [_group(blocks, modules, anatomy, counted) for blocks in groups.values()]


def split_layer(name: str) -> tuple[str, int | None, str]:
    """The list of layers, the index in it and the path inside the layer; no index where there is no list."""
    found = _LAYER.fullmatch(f"{name}.")
    return (found[1] or "", int(found[2]), found[3].rstrip(".")) if found else ("", None, name)


def _path(name: str) -> str:
    return split_layer(name)[2]


def _group(blocks: list[Block], modules: Modules, anatomy: Anatomy, counted: set[int]) -> RoutedExperts:
    first = blocks[0]
    stack = split_layer(first.name)[0]
    indices = [split_layer(block.name)[1] for block in blocks]
    members = list(first.experts.values())
    parameters, active = _count(blocks, counted)
    return RoutedExperts(
        stack=stack,
        stack_layers=len(list(modules[stack].children())) if None not in indices else 0,
        layers=[index for index in indices if index is not None],
        modules=[_path(name) for name in first.experts],
        class_names=_unique(type(modules[name]).__name__ for name in first.experts),
        num_experts=sorted({e.num_experts for b in blocks for e in b.experts.values() if e.num_experts}),
        identity_experts=members[0].identity_experts,
        top_k=sorted({block.top_k for block in blocks if block.top_k is not None}),
        shared_experts=_shared_experts(stack, indices, modules, anatomy),
        router=first.router,
        layout=_unique(word for member in members for word in member.layout),
        read_from="; ".join(_unique(member.read_from for member in members)),
        other_modality=not anatomy.other_experts.keys().isdisjoint(first.experts),
        parameters=parameters,
        active_parameters=active,
    )


def _shared_experts(stack: str, indices: list[int | None], modules: Modules, anatomy: Anatomy) -> list[str]:
    """What is called shared in these layers and has a matrix, and what a plug-in says is shared."""
    told = {name for name in anatomy.shared_experts if not _SHARED.search(name)}
    found = []
    for name, module in modules.items():
        owner, index, path = split_layer(name)
        if owner != stack or index not in indices:
            continue
        is_called_so = _SHARED.search(path) is not None and not _SHARED.search(path.rpartition(".")[0])
        # The gate of a shared expert is a weight for it, not an expert.
        if name in told or (
            is_called_so and not path.endswith("gate") and any(p.ndim > 1 for p in module.parameters())
        ):
            found.append(path)
    return _unique(found)


def _count(blocks: list[Block], counted: set[int]) -> tuple[int, int | None]:
    """All parameters of the experts, and those that a token is sent to; weights in `counted` are left out."""
    parameters, active = 0, 0
    is_known = True
    for block in blocks:
        for experts in block.experts.values():
            new = [p for p in experts.parameters if id(p) not in counted]
            counted.update(id(p) for p in new)
            parameters += sum(p.numel() for p in new)
            if block.top_k is None or not experts.expert_size:
                is_known = False
            elif new:
                active += _active(experts, block.top_k)
    return parameters, active if is_known else None


def _active(experts: Experts, top_k: int) -> int:
    return min(top_k, experts.num_experts or top_k) * experts.expert_size


def _unique(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))
