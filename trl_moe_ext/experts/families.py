"""The families of transformers whose experts structure alone does not tell, one record each.

Most families need no record: see `trl_moe_ext/experts/reading.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from trl_moe_ext.experts.layout import ExpertsLayout, Projection
from trl_moe_ext.experts.registry import ExpertsFamily
from trl_moe_ext.experts.stacks import gate_with
from trl_moe_ext.hookspecs import hookimpl

Reader = Callable[[nn.Module], ExpertsLayout | None]


def _reader(
    class_name: str, read: Callable[[nn.Module], ExpertsLayout]
) -> Callable[[nn.Module], ExpertsLayout | None]:
    """`read` for modules of that class or of a subclass, None for all others."""
    return lambda module: read(module) if _is_a(module, class_name) else None


def _is_a(module: nn.Module, class_name: str) -> bool:
    return any(c.__name__ == class_name for c in type(module).__mro__)


def _llama4(module: Any) -> ExpertsLayout:
    """Transposed stacks. The stock block multiplies every token by every expert, weighted on the input side."""
    from trl_moe_ext.experts.sparse_llama4 import SparseLlama4TextMoe

    (experts, hidden, gate_up), (_, inner, _) = module.gate_up_proj.shape, module.down_proj.shape
    return ExpertsLayout(
        experts,
        (
            Projection("gate_up_proj", "up", hidden, gate_up, is_transposed=True),
            Projection("down_proj", "down", inner, hidden, is_transposed=True),
        ),
        partial(gate_with, "act_fn"),
        weights_on_input=True,
        sparse_block=SparseLlama4TextMoe,
    )


def _dbrx(module: Any) -> ExpertsLayout:
    """Gate (w1), up (v1) and down (w2) in three matrices that hold all experts one below the other."""
    experts, inner, hidden = module.num_experts, module.ffn_hidden_size, module.hidden_size
    return ExpertsLayout(
        experts,
        (
            Projection("w1", "gate", hidden, inner, path="mlp.w1"),
            Projection("v1", "up", hidden, inner, path="mlp.v1"),
            Projection("w2", "down", inner, hidden, is_transposed=True, path="mlp.w2"),
        ),
        _gate_of_dbrx,
    )


def _gate_of_dbrx(module: Any, gate_up: Tensor) -> Tensor:
    return gate_with("activation_fn", module.mlp, gate_up)


def _jetmoe(module: Any) -> ExpertsLayout:
    """One projection of all experts, of an MLP or of attention, called with rows that are sorted by expert."""
    experts, out_features, in_features = module.weight.shape
    return ExpertsLayout(experts, (Projection("weight", "up", in_features, out_features),), takes_rows=True)


def _longcat_flash(module: Any) -> ExpertsLayout:
    """Behind the experts stand identity experts, for which only the first stack has rows, which nothing reads."""
    experts, hidden, inner = module.down_proj.shape
    return ExpertsLayout(
        experts,
        (
            Projection("gate_up_proj", "up", hidden, module.gate_up_proj.shape[1]),
            Projection("down_proj", "down", inner, hidden),
        ),
        partial(gate_with, "act_fn"),
        identity_experts=module.zero_expert_num,
    )


def _doge(module: nn.Module) -> dict[str, list[str]] | None:
    """Experts of a single neuron, in two embeddings that product keys look up."""
    if not _is_a(module, "DogeCDMoE"):
        return None
    return {
        "experts": ["down_embed", "up_embed"],
        "shared_experts": ["gate_proj", "up_proj", "down_proj"],
        "router": ["router_gate"],
    }


@hookimpl
def register_experts_families() -> Sequence[ExpertsFamily]:
    """Families outside transformers' experts interface that cannot be told by structure."""
    return (
        ExpertsFamily("llama4", "sparse instead of the stock dense product", _reader("Llama4TextExperts", _llama4)),
        ExpertsFamily("dbrx", "three matrices with all experts one below the other", _reader("DbrxExperts", _dbrx)),
        ExpertsFamily(
            "jetmoe", "single projections, of MLPs and of attention", _reader("JetMoeParallelExperts", _jetmoe)
        ),
        ExpertsFamily(
            "longcat_flash", "identity experts behind the others", _reader("LongcatFlashExperts", _longcat_flash)
        ),
        ExpertsFamily("doge", "embeddings looked up by product keys: ordinary LoRA", read_parts=_doge),
    )
