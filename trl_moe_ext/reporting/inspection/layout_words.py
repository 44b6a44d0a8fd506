"""How experts are stored and run, and what told so, in words that a user understands."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from trl_moe_ext.experts.interface import read_interface
from trl_moe_ext.experts.layout import ExpertsLayout, stack_of
from trl_moe_ext.experts.registry import ExpertsFamily
from trl_moe_ext.plugins import host


def stacks_in_words(module: nn.Module, layout: ExpertsLayout) -> list[str]:
    """What is special about a module of stacked experts, the form of its projections first."""
    transposed = [p.name for p in layout.projections if p.is_transposed]
    all_transposed = len(transposed) == len(layout.projections)
    words = {
        _projections(layout): True,
        "one matrix a projection, an expert below the other": stack_of(module, layout.projections[0]).ndim == 2,
        "transposed, (experts, in, out)": all_transposed,
        f"transposed: {', '.join(transposed)}": bool(transposed) and not all_transposed,
        "biases": any(p.bias for p in layout.projections),
        "a norm after each expert": layout.has_post_norm,
        "routing weights multiply the input": layout.weights_on_input,
        f"{layout.identity_experts} identity experts": layout.identity_experts > 0,
        "stock computes every expert for every token, moe_lora only the chosen": layout.sparse_block is not None,
    }
    return [word for word, holds in words.items() if holds]


def singles_in_words(experts: Iterable[nn.Module]) -> list[str]:
    """What experts are that are modules of their own."""
    kinds = sorted({"Embeddings" if isinstance(each, nn.Embedding) else "Linears" for each in experts})
    return [f"{' and '.join(kinds)} of their own: ordinary LoRA"]


def read_from(module: nn.Module) -> str:
    """What tells the layout of a module, or of a block, of experts."""
    if read_interface(module) is not None:
        return "transformers' experts interface"
    families: dict[str, ExpertsFamily] = host().records("register_experts_families")
    for name, family in families.items():
        for read in (family.read_layout, family.read_parts):
            if read is not None and read(module) is not None:
                return f"record {name}"
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return "their structure: a list of modules made of Linears"
    return "names and shapes; compared with the module itself when an adapter is attached"


def _projections(layout: ExpertsLayout) -> str:
    if layout.takes_rows:
        return "single projections, called with rows sorted by expert"
    if not layout.has_gate:
        return "up and down, no gate"
    if layout.by_role("gate") is not None:
        return "gate, up and down apart"
    return "gate and up in one stack, " + ("interleaved" if layout.is_interleaved else "in two halves")
