"""What an adapter trains, part by part, counted on the model itself and not on the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from rich.table import Table
from torch import nn

from trl_moe_ext.experts.anatomy import Anatomy, read_anatomy
from trl_moe_ext.reporting.trained_experts import trained_experts
from trl_moe_ext.tuners.targets.resolve import base_modules

_EXPERTS = "routed experts"
_PARTS = (_EXPERTS, "shared experts", "attention", "dense MLP", "router", "other Linears", "trained in full")


@dataclass(frozen=True)
class AdaptedPart:
    """One row of the table: a part of the model, its adapted modules and their trainable parameters.

    Attributes:
        detail: which of the routed experts, where not all are trained alike; empty otherwise.
    """

    part: str
    modules: int
    parameters: int
    detail: str = ""


def adapted_parts(model: nn.Module) -> list[AdaptedPart]:
    """Count the trainable parameters of every part of `model`; parts without any are there with zeros.

    The first five rows are always the same; `other Linears` (such as those of a vision tower that the user named)
    and `trained in full` (`modules_to_save`) follow if there are some.
    """
    parts = _part_of_module(read_anatomy(base_modules(model)))
    modules = dict.fromkeys(_PARTS, 0)
    parameters = dict.fromkeys(_PARTS, 0)
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            part = (
                "trained in full" if isinstance(module, AuxiliaryTrainingWrapper) else parts.get(name, "other Linears")
            )
            trained = [p for p in module.parameters() if p.requires_grad and id(p) not in owners]
            owners.update((id(p), part) for p in trained)
            modules[part] += bool(trained)
            parameters[part] += sum(p.numel() for p in trained)
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in owners]
    parameters["trained in full"] += sum(p.numel() for p in rest)
    details = {_EXPERTS: trained_experts(model)} if parameters[_EXPERTS] else {}
    return [
        AdaptedPart(p, modules[p], parameters[p], details.get(p, ""))
        for p in _PARTS
        if parameters[p] or p in _PARTS[:5]
    ]


def adapted_table(model: nn.Module) -> Table:
    """`adapted_parts` as a table for the terminal; below it which experts, and the share of all parameters."""
    rows = adapted_parts(model)
    trained = sum(row.parameters for row in rows)
    total = sum(p.numel() for p in model.parameters())
    details = [f"{row.part}: {row.detail}" for row in rows if row.detail]
    caption = "\n".join([*details, f"{trained:,} of {total:,} parameters ({trained / total:.2%})"])
    table = Table(title="What is trained", caption=caption)
    table.add_column("part")
    table.add_column("modules", justify="right")
    table.add_column("trainable parameters", justify="right")
    for row in rows:
        table.add_row(row.part, f"{row.modules:,}", f"{row.parameters:,}")
    return table


def _part_of_module(anatomy: Anatomy) -> dict[str, str]:
    parts = dict.fromkeys((*anatomy.experts, *anatomy.other_experts, *anatomy.expert_linears), _EXPERTS)
    words = {
        "shared_experts": "shared experts",
        "attention": "attention",
        "dense_mlp": "dense MLP",
        "router": "router",
    }
    for word, part in words.items():
        parts |= dict.fromkeys(getattr(anatomy, word), part)
        parts |= {name.rpartition(".")[0]: part for name in anatomy.parameters[word]}
    return parts
