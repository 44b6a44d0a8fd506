"""The decoder layers that can be measured, each of its family's own classes and of its real sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from trl_moe_ext.errors import ConfigError, near_matches

VOCABULARY = 1024


@dataclass(frozen=True)
class Shape:
    """One decoder layer between an embedding and a head of 1,024 tokens.

    Attributes:
        model_class, config_class: of the family.
        sizes: what the config is made of, besides one layer and 1,024 tokens.
    """

    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]
    sizes: Mapping[str, Any]

    def build(self, dtype: torch.dtype, device: str) -> PreTrainedModel:
        """The model with random weights, the same in every process; without weights on the device ``meta``."""
        torch.manual_seed(0)
        special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        config = self.config_class(vocab_size=VOCABULARY, num_hidden_layers=1, **special, **self.sizes)
        with torch.device(device):
            return self.model_class._from_config(config, dtype=dtype)


def shape_named(name: str) -> Shape:
    """The shape of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SHAPES:
        raise ConfigError(f"there is no shape {name!r}; {near_matches(name, SHAPES)}")
    return SHAPES[name]


def _shape(model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], **sizes: Any) -> Shape:
    return Shape(model_class, config_class, sizes)


def _llama4(num_experts: int, **sizes: Any) -> Shape:
    """In Maverick only every second layer has experts: this is one of those."""
    return _shape(
        Llama4ForCausalLM,
        Llama4TextConfig,
        num_local_experts=num_experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        **sizes,
    )


SHAPES = {
    "qwen3-30b-a3b": _shape(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    ),
    "gemma4-26b-a4b": _shape(
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        hidden_size=2816,
        moe_intermediate_size=704,
        num_experts=128,
        top_k_experts=8,
        enable_moe_block=True,
        intermediate_size=2112,
        hidden_size_per_layer_input=0,
        layer_types=["full_attention"],  # what its class makes of the last layer
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        attention_k_eq_v=True,
    ),
    "gpt-oss-20b": _shape(
        GptOssForCausalLM,
        GptOssConfig,
        hidden_size=2880,
        intermediate_size=2880,
        num_local_experts=32,
        num_experts_per_tok=4,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        sliding_window=128,
    ),
    "mixtral-8x7b": _shape(
        MixtralForCausalLM,
        MixtralConfig,
        hidden_size=4096,
        intermediate_size=14336,
        num_local_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "olmoe": _shape(
        OlmoeForCausalLM,
        OlmoeConfig,
        hidden_size=2048,
        intermediate_size=1024,
        num_experts=64,
        num_experts_per_tok=8,
        num_attention_heads=16,
    ),
    "deepseek-v2-lite": _shape(
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        hidden_size=2048,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        first_k_dense_replace=0,
        num_attention_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    "llama4-scout": _llama4(
        16, hidden_size=5120, intermediate_size=8192, num_attention_heads=40, num_key_value_heads=8, head_dim=128
    ),
    "llama4-maverick": _llama4(
        128,
        hidden_size=5120,
        intermediate_size=8192,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        use_qk_norm=False,
    ),
    # Scout in small, for a machine that Scout does not fit.
    "llama4-small": _llama4(
        16, hidden_size=1024, intermediate_size=2048, num_attention_heads=16, num_key_value_heads=4, head_dim=64
    ),
}
