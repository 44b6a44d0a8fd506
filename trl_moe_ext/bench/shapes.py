"""The decoder layers that can be measured, each built from the family's own classes with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as Qwen3Moe

VOCABULARY = 1024


@dataclass(frozen=True)
class Shape:
    """One decoder layer between an embedding and a head of 1,024 tokens.

    Attributes:
        description: its sizes, for the title of a table.
        model_class: of the family.
        config: makes its config.
    """

    description: str
    model_class: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]

    def build(self, dtype: torch.dtype, experts_implementation: str) -> nn.Module:
        """The model in training mode, on the CPU."""
        torch.manual_seed(0)
        with torch.device("cpu"):
            model = self.model_class._from_config(self.config(), dtype=dtype)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.02)  # some families leave stacks of experts empty
        model.config._experts_implementation = experts_implementation  # read in each forward, where there is a choice
        return model.train()  # type: ignore[no-any-return]


SHAPES = {
    "qwen3-30b-a3b": Shape(
        "E=128 H=2048 I=768 top-8",
        Qwen3Moe,
        lambda: Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=2048,
            moe_intermediate_size=768,
            num_hidden_layers=1,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
        ),
    ),
    "llama4-small": Shape(
        "E=16 H=1024 I=2048 top-1",
        Llama4ForCausalLM,
        lambda: Llama4TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=1,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            num_local_experts=16,
            num_experts_per_tok=1,
            interleave_moe_layer_step=1,
        ),
    ),
}
