"""Which dense architecture can become which mixture, and with which configuration.

A target must repeat the source's attention to the letter. Only `llama`, `mistral`, `qwen2` and `qwen3` have one; where
a target lacks something that a checkpoint uses, the checkpoint is refused with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from trl_moe_ext.errors import LayoutError

__all__ = ["UPCYCLE_FAMILIES", "UpcycleFamily", "check_source", "moe_config"]

# Qwen2-MoE always has a shared expert. It gets this width and starts silent; 64 columns keep its rows aligned for
# every kernel and divisible for tensor parallelism.
SHARED_EXPERT_WIDTH = 64


@dataclasses.dataclass(frozen=True)
class UpcycleFamily:
    """How one dense `model_type` is turned into a mixture.

    Attributes:
        target: `model_type` of the mixture.
        options: from the dense configuration, the number of experts and top_k to the fields that the target has and
            the source has not, or that mean something else there.
        obstacle: from the dense configuration to the reason why the target would not compute the same, else None.
    """

    target: str
    options: Callable[[Any, int, int], dict[str, Any]]
    obstacle: Callable[[Any], str | None]


def _mixtral_options(dense: Any, num_experts: int, top_k: int) -> dict[str, Any]:
    return {"num_local_experts": num_experts, "num_experts_per_tok": top_k}


def _llama_obstacle(dense: Any) -> str | None:
    biased = [name for name in ("attention_bias", "mlp_bias") if getattr(dense, name)]
    return f"it has {' and '.join(biased)}, and Mixtral has no biases" if biased else None


def _qwen2_moe_options(dense: Any, num_experts: int, top_k: int) -> dict[str, Any]:
    options = {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": dense.intermediate_size,
        "shared_expert_intermediate_size": SHARED_EXPERT_WIDTH,
        "qkv_bias": True,
    }
    return options | ({"head_dim": dense.head_dim} if hasattr(dense, "head_dim") else {})


def _qwen2_obstacle(dense: Any) -> str | None:
    # transformers' Qwen2-MoE puts the window into the mask only, and flash attention does not look at that mask.
    return "it has sliding-window layers, whose window Qwen2-MoE ignores" if _sliding_layers(dense) else None


def _qwen3_moe_options(dense: Any, num_experts: int, top_k: int) -> dict[str, Any]:
    # One window for all layers, so a checkpoint that names a window and uses it nowhere must not pass it on.
    window = dense.sliding_window if _sliding_layers(dense) else None
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "moe_intermediate_size": dense.intermediate_size,
        "head_dim": dense.head_dim,
        "use_sliding_window": window is not None,
        "sliding_window": window,
    }


def _qwen3_obstacle(dense: Any) -> str | None:
    if 0 < _sliding_layers(dense) < dense.num_hidden_layers:
        return "only some of its layers have a sliding window, and Qwen3-MoE has one window for all"
    return None


def _sliding_layers(dense: Any) -> int:
    return sum(kind == "sliding_attention" for kind in dense.layer_types)


UPCYCLE_FAMILIES = {
    "llama": UpcycleFamily("mixtral", _mixtral_options, _llama_obstacle),
    "mistral": UpcycleFamily("mixtral", _mixtral_options, lambda dense: None),
    "qwen2": UpcycleFamily("qwen2_moe", _qwen2_moe_options, _qwen2_obstacle),
    "qwen3": UpcycleFamily("qwen3_moe", _qwen3_moe_options, _qwen3_obstacle),
}

# Where the mixtures that transformers knows keep their number of experts.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def check_source(settings: Mapping[str, Any], directory: Path) -> None:
    """Refuses, from the plain contents of its `config.json`, a checkpoint that is not dense or has no exact target.

    Raises:
        LayoutError: it is quantised, a mixture already, or of another type than those above.
    """
    model_type = str(settings.get("model_type"))
    if any(settings.get(name) for name in _EXPERT_COUNTS):
        raise LayoutError(f"{directory} holds a mixture of experts already (model_type {model_type!r})")
    if model_type not in UPCYCLE_FAMILIES:
        supported = ", ".join(UPCYCLE_FAMILIES)
        raise LayoutError(
            f"no mixture repeats model_type {model_type!r} of {directory} exactly; supported: {supported}"
        )
    if settings.get("quantization_config"):
        raise LayoutError(f"{directory} is quantised; save it in 16 or 32 bits first")


def moe_config(dense: Any, num_experts: int, top_k: int) -> Any:
    """The configuration of the mixture that computes what a dense model with configuration `dense` computes.

    Raises:
        LayoutError: the target lacks something that this checkpoint uses.
    """
    family = UPCYCLE_FAMILIES[dense.model_type]
    if reason := family.obstacle(dense):
        raise LayoutError(f"this {dense.model_type} checkpoint cannot become {family.target}: {reason}")
    target = CONFIG_MAPPING[family.target]
    common = {field.name for field in dataclasses.fields(dense)} & {field.name for field in dataclasses.fields(target)}
    common -= {"architectures", "transformers_version"}
    carried = {name: copy.deepcopy(getattr(dense, name)) for name in sorted(common)}
    return target(**(carried | family.options(dense, num_experts, top_k)))
