"""A part of the experts of every layer, for checks of tuners that train some only."""

from __future__ import annotations

import torch
from torch import nn

from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.experts.layout import weight_view
from trl_moe_ext.experts.reading import read_layout


def some_experts(model: nn.Module, first: int = 0) -> dict[str, list[int]]:
    """Every third expert of each module of experts, from `first` on; of a layer's modules the same.

    Left out are experts of another modality, which are adapted only if they are named, and experts that cannot be told
    apart, rows of larger matrices.
    """
    modules = dict(model.named_modules())
    anatomy = read_anatomy((name, module) for name, module in modules.items() if name)
    sizes = {name: layout.num_experts for name, layout in anatomy.experts.items()}
    for name in {*anatomy.expert_linears.values()}:
        if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            sizes[name] = len(list(modules[name].children()))
    return {name: list(range(min(first, size - 1), size, 3)) for name, size in sorted(sizes.items())}


def changed_experts(before: nn.Module, after: nn.Module) -> list[int]:
    """Indices of the experts of a module whose weights differ in any bit.

    Args:
        before, after: the same module of experts of two models.
    """
    layout = read_layout(before)
    if layout is None:
        pairs = zip(before.children(), after.children(), strict=True)
        return [index for index, experts in enumerate(pairs) if _differ(*experts)]
    changed: set[int] = set()
    for projection in layout.projections:
        ours, theirs = (weight_view(module, projection, layout) for module in (before, after))
        changed |= {*(ours != theirs).flatten(1).any(1).nonzero().flatten().tolist()}
    return sorted(changed)


def _differ(one: nn.Module, other: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
