"""Is this a module of routed experts, and how is it laid out? Asked of every module of a model; no model is named.

The flags of transformers' experts interface answer first, then the records of plug-ins, for the families that go their
own way (`register_experts_families`). What neither knows is read by names and shapes, and compared with the module's
own output before it is used: so a family that appears tomorrow works today, or is refused, but is never misread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import nn

from trl_moe_ext.errors import PluginError
from trl_moe_ext.experts.interface import read_interface
from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.experts.registry import PARTS, ExpertsFamily
from trl_moe_ext.experts.stacks import infer_layout
from trl_moe_ext.plugins import host

BLOCK_PARTS = ("experts", *PARTS)
Answer = TypeVar("Answer")


def read_layout(module: nn.Module) -> ExpertsLayout | None:
    """The layout of `module`, or None if it is not a module of routed experts.

    Raises:
        LayoutError: the module is one, but its parameters do not fit together.
        PluginError: a plug-in's record failed on the module.
    """
    if not any(parameter.ndim >= 2 for parameter in module.parameters()):
        return None
    return read_interface(module) or _read_by_record(module) or infer_layout(module)


def read_block_parts(module: nn.Module) -> dict[str, list[str]]:
    """Part of a model -> names of the children of `module` that belong to it, by the records of plug-ins.

    Raises:
        PluginError: a record failed on the module, or names a part or a child that there is not.
    """
    for family in _families():
        parts = _ask(family, family.read_parts, module)
        if parts is not None:
            children = dict(module.named_children())
            for part, names in parts.items():
                if part not in BLOCK_PARTS or not set(names) <= children.keys():
                    raise PluginError(
                        f"record {family.name!r} says that {names} of {type(module).__name__} are {part!r}; parts are "
                        f"{', '.join(BLOCK_PARTS)}, its children {', '.join(children)}"
                    )
            return parts
    return {}


def _read_by_record(module: nn.Module) -> ExpertsLayout | None:
    for family in _families():
        layout = _ask(family, family.read_layout, module)
        if layout is not None:
            return replace(layout, read_from=family.name)
    return None


def _ask(family: ExpertsFamily, read: Callable[[nn.Module], Answer | None] | None, module: nn.Module) -> Answer | None:
    try:
        return None if read is None else read(module)
    except Exception as error:
        raise PluginError(
            f"record {family.name!r} of register_experts_families failed on {type(module).__name__}: {error!r}"
        ) from error


def _families() -> list[ExpertsFamily]:
    return list(host().records("register_experts_families").values())
