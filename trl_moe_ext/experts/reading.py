"""Is this a module of routed experts, and how is it laid out? Asked of every module of a model; no model is named.

The flags of transformers' experts interface answer first, then the records of plug-ins, for the families that go their
own way (`register_experts_families`). What neither knows is read by names and shapes, and compared with the module's
own output before it is used: so a family that appears tomorrow works today, or is refused, but is never misread.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from trl_moe_ext.experts.interface import read_interface
from trl_moe_ext.experts.layout import ExpertsLayout, check_dtypes
from trl_moe_ext.experts.registry import ExpertsFamily
from trl_moe_ext.experts.stacks import infer_layout
from trl_moe_ext.plugins import host


def read_layout(module: nn.Module) -> ExpertsLayout | None:
    """The layout of `module`, or None if it is not a module of routed experts.

    Raises:
        LayoutError: the module is one, but its parameters do not fit together.
    """
    if not any(parameter.ndim >= 2 for parameter in module.parameters()):
        return None
    layout = read_interface(module) or _read_by_record(module) or infer_layout(module)
    return None if layout is None else check_dtypes(module, layout)


def read_block_parts(module: nn.Module) -> dict[str, list[str]]:
    """Part of a model -> names of the children of `module` that belong to it, by the records of plug-ins."""
    for family in _families():
        parts = family.read_parts(module) if family.read_parts is not None else None
        if parts is not None:
            return parts
    return {}


def _read_by_record(module: nn.Module) -> ExpertsLayout | None:
    for family in _families():
        layout = family.read_layout(module) if family.read_layout is not None else None
        if layout is not None:
            return replace(layout, read_from=family.name)
    return None


def _families() -> list[ExpertsFamily]:
    return list(host().records("register_experts_families").values())
