"""Infer the layout of stacked experts that carry no flags: from names, shapes and the forward signature."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from trl_moe_ext.experts.interface import apply_gate
from trl_moe_ext.experts.layout import ExpertsLayout, Projection

# The names that projections have in the field: with the gate in the first stack, in one of its own, or without one.
_GATE_UP = ("gate_up_proj", "down_proj")
_APART = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_UNGATED = ("up_proj", "down_proj")
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
_INDEX = re.compile(r"ind(ex|ices)|idx|selected|chosen")


def infer_layout(module: nn.Module) -> ExpertsLayout | None:
    """The layout that the three-dimensional parameters of a module suggest, or None if they suggest none.

    A module with anything besides stacks, biases and an activation is left alone: what the rest does is unknown.
    """
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    names = next((n for n in (_GATE_UP, *_APART, _UNGATED) if own.keys() == set(n)), None)
    if names is None or len({stack.shape[0] for stack in own.values()}) != 1 or not _is_called_with_routing(module):
        return None
    biases = {name: f"{name}_bias" for name in names if isinstance(getattr(module, f"{name}_bias", None), Tensor)}
    if {name for name, _ in module.named_parameters()} != {*names, *biases.values()}:
        return None
    if any(name not in _ACTIVATIONS for name, _ in module.named_children()):
        return None  # such as a dropout
    is_transposed = _is_transposed(module, names, own)
    activation = _activation(module, has_gate=names != _UNGATED)
    if is_transposed is None or activation is None or (biases and names in _APART):
        return None
    roles = ("gate", "up", "down")[-len(names) :]
    in_axis, out_axis = (1, 2) if is_transposed else (2, 1)
    projections = tuple(
        Projection(name, role, own[name].shape[in_axis], own[name].shape[out_axis], is_transposed, biases.get(name))  # type: ignore[arg-type]
        for name, role in zip(names, roles, strict=True)
    )
    return ExpertsLayout(
        own[names[0]].shape[0], projections, activation, has_gate=names != _UNGATED, read_from="structure"
    )


def _is_called_with_routing(module: nn.Module) -> bool:
    """Whether the forward takes tokens, chosen experts and routing weights, and nothing else."""
    names = list(inspect.signature(module.forward).parameters)
    return len(names) == 3 and _INDEX.search(names[1]) is not None


def _is_transposed(module: nn.Module, names: tuple[str, ...], stacks: dict[str, nn.Parameter]) -> bool | None:
    """Whether the stacks are ``(E, in, out)``; None if the shapes fit neither orientation.

    Without the gate in the first stack both orientations fit the shapes: then the hidden size that the module knows
    decides, and ``(E, out, in)`` is assumed without one.
    """
    first, down = stacks[names[0]], stacks[names[-1]]
    factor = 2 if names == _GATE_UP else 1
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", first.shape[2]))
    if factor == 1 and first.shape[1] != first.shape[2] and first.shape[1] == hidden:
        return True if down.shape[2] == hidden else None
    if first.shape[1:] == (factor * down.shape[2], down.shape[1]):
        return False
    return True if first.shape[1:] == (down.shape[2], factor * down.shape[1]) else None


def _activation(module: nn.Module, has_gate: bool) -> Callable[[nn.Module, Tensor], Tensor] | None:
    if has_gate and hasattr(module, "_apply_gate"):
        return apply_gate
    name = next((name for name in _ACTIVATIONS if callable(getattr(module, name, None))), None)
    return partial(gate_with if has_gate else _act_by, name) if name else None


def gate_with(name: str, module: nn.Module, gate_up: Tensor) -> Tensor:
    """The module's activation called `name` on the first half, times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    out: Tensor = getattr(module, name)(gate) * up
    return out


def _act_by(name: str, module: nn.Module, up: Tensor) -> Tensor:
    out: Tensor = getattr(module, name)(up)
    return out
