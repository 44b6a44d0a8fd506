"""What is compared: the same decoder layer, with its experts frozen or adapted in different ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from trl_moe_ext.tuners.moe_lora import MoeLoraConfig

_ATTENTION = ["q_proj", "v_proj"]
_STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def qwen3_30b_a3b_layer(dtype: torch.dtype, experts_implementation: str) -> nn.Module:
    """One decoder layer of Qwen3-30B-A3B with random weights, between an embedding and a head of 1,024 tokens.

    E=128, H=2048, I=768, top-8; 0.6 billion parameters.
    """
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    )
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = Qwen3MoeForCausalLM._from_config(config, dtype=dtype, experts_implementation=experts_implementation)
    return model.train()  # type: ignore[no-any-return]


def _frozen(model: nn.Module, rank: int) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=rank, target_modules=_ATTENTION))  # type: ignore[no-any-return]


def _moe_lora(model: nn.Module, rank: int) -> nn.Module:
    return get_peft_model(model, MoeLoraConfig(r=rank, target_modules=_ATTENTION))  # type: ignore[no-any-return]


def _target_parameters(model: nn.Module, rank: int) -> nn.Module:
    config = LoraConfig(r=rank, target_modules=_ATTENTION, target_parameters=_STACKS)
    return get_peft_model(model, config)  # type: ignore[no-any-return]


# Name -> (experts implementation of transformers, how to attach the adapter). All train LoRA on q_proj and v_proj.
PEERS: dict[str, tuple[str, Callable[[nn.Module, int], nn.Module]]] = {
    "frozen": ("grouped_mm", _frozen),
    "moe_lora": ("grouped_mm", _moe_lora),
    "peft_grouped_mm": ("grouped_mm", _target_parameters),
    "peft_eager": ("eager", _target_parameters),
}
