"""What is compared: the same decoder layer, with its experts frozen or adapted in different ways."""

from __future__ import annotations

from collections.abc import Callable

from peft import LoraConfig, get_peft_model
from torch import nn

from trl_moe_ext.tuners.moe_lora import MoeLoraConfig

_ATTENTION = ["q_proj", "v_proj"]
_STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def _frozen(model: nn.Module, rank: int) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=rank, target_modules=_ATTENTION))  # type: ignore[no-any-return]


def _moe_lora(model: nn.Module, rank: int) -> nn.Module:
    return get_peft_model(model, MoeLoraConfig(r=rank, target_modules=_ATTENTION))  # type: ignore[no-any-return]


def _moe_lora_fused(model: nn.Module, rank: int) -> nn.Module:
    config = MoeLoraConfig(r=rank, target_modules=_ATTENTION, kernel="fused")
    return get_peft_model(model, config)  # type: ignore[no-any-return]


def _target_parameters(model: nn.Module, rank: int) -> nn.Module:
    config = LoraConfig(r=rank, target_modules=_ATTENTION, target_parameters=_STACKS)
    return get_peft_model(model, config)  # type: ignore[no-any-return]


# Name -> (experts implementation of transformers, how to attach the adapter). All train LoRA on q_proj and v_proj.
# Families outside transformers' experts interface have one implementation, whatever is asked for.
PEERS: dict[str, tuple[str, Callable[[nn.Module, int], nn.Module]]] = {
    "frozen": ("grouped_mm", _frozen),
    "moe_lora": ("grouped_mm", _moe_lora),
    "moe_lora_fused": ("grouped_mm", _moe_lora_fused),
    "peft_grouped_mm": ("grouped_mm", _target_parameters),
    "peft_eager": ("eager", _target_parameters),
}
