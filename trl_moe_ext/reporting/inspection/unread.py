"""What was seen of experts that cannot be read: all that the author of a record for the family needs to know."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn

from trl_moe_ext.experts.interface import read_interface
from trl_moe_ext.plugins import host


@dataclass(frozen=True)
class UnreadExperts:
    """A module that is called experts and whose layout is not known.

    Attributes:
        name: of the module; of the first, where several layers have the same.
        occurrences: how many modules of this class there are.
        class_name: its class.
        parameters: name -> shape.
        forward: the signature of its forward.
        missing: what each way of reading would have needed.
    """

    name: str
    occurrences: int
    class_name: str
    parameters: dict[str, list[int]]
    forward: str
    missing: list[str]


def describe_unread(names: list[str], modules: dict[str, nn.Module]) -> list[UnreadExperts]:
    """One description for each class of the modules called `names`."""
    by_class: dict[type[nn.Module], list[str]] = {}
    for name in names:
        by_class.setdefault(type(modules[name]), []).append(name)
    return [_describe(alike, modules[alike[0]]) for alike in by_class.values()]


def _describe(names: list[str], module: nn.Module) -> UnreadExperts:
    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    forward = f"forward{inspect.signature(module.forward)}"
    return UnreadExperts(names[0], len(names), type(module).__name__, shapes, forward, _missing(module, shapes))


def _missing(module: nn.Module, shapes: dict[str, list[int]]) -> list[str]:
    stacks = [name for name, shape in shapes.items() if len(shape) == 3]
    records = ", ".join(host().records("register_experts_families"))
    found = ["no flags of transformers' experts interface"] if read_interface(module) is None else []
    found.append(f"no record knows it; asked: {records}")
    found.append(
        "names and shapes need stacks (E, ., .) called gate_up_proj or gate_proj and up_proj, and down_proj (or w1, "
        "w3, w2), nothing else, an activation, and a forward of three tensors: tokens, chosen experts, weights; found "
        f"{', '.join(stacks) or 'no stacks'}"
    )
    return found
