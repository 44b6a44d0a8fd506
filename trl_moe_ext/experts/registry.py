"""What a plug-in for a family of experts provides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from trl_moe_ext.experts.layout import ExpertsLayout

# The parts of a model around its experts.
PARTS = ("attention", "shared_experts", "dense_mlp", "router")


@dataclass(frozen=True)
class ExpertsFamily:
    """How to recognise the experts of a family that structure alone does not tell. Give one of the two functions.

    Attributes:
        name: unique among the families.
        description: one line for ``trl-moe plugins``.
        read_layout: from any module to its layout, or None if it is not this family's module of routed experts: for
            experts that are kept in stacks, which take the grouped path.
        read_parts: from any module to the names of its children by part of the model (``experts``,
            ``shared_experts``, ``router``), or None if it is not this family's block: for experts that are Linears or
            Embeddings of their own, which take PEFT's ordinary LoRA.
    """

    name: str
    description: str
    read_layout: Callable[[nn.Module], ExpertsLayout | None] | None = None
    read_parts: Callable[[nn.Module], dict[str, list[str]] | None] | None = None
