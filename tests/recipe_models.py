"""The models of the recipes in `configs/`: at their true size without memory, and small enough to train in a test.

`data/recipe_configs/` holds, under the name of each recipe, what the model's config.json on the Hub says about its
architecture. Sizes are computed from it; the small models keep all of it except the sizes.
"""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.tiny_checkpoints import CHAT_TEMPLATE, VOCAB_SIZE, byte_tokenizer

# TRL's copies of the models' own chat templates, where it has one.
_CHAT_TEMPLATES = {
    "qwen3_30b_a3b_sft": "qwen3_instruct_2507.jinja",
    "gemma4_26b_a4b_sft": "gemma4.jinja",
    "gpt_oss_20b_sft": "gptoss.jinja",
}
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "vocab_size": VOCAB_SIZE,
    "sliding_window": 16,
    "image_size": 28,
    "position_embedding_size": 8,
}


def full_size(recipe: str) -> nn.Module:
    """The model of a recipe on the meta device: shapes and names, no weights."""
    with torch.device("meta"):
        return _build(_published(recipe))


def save_small(recipe: str, directory: Path) -> None:
    """Save a checkpoint of the recipe's architecture with small sizes, random weights and a tokenizer."""
    torch.manual_seed(0)
    _build(_shrink(_published(recipe))).save_pretrained(directory)
    byte_tokenizer(_chat_template(recipe)).save_pretrained(directory)


def _published(recipe: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "data" / "recipe_configs" / f"{recipe}.json").read_text())


def _build(config: dict[str, Any]) -> nn.Module:
    options = {name: value for name, value in config.items() if name != "model_type"}
    architecture = getattr(transformers, config["architectures"][0])
    return architecture(transformers.AutoConfig.for_model(config["model_type"], **options))


def _shrink(config: dict[str, Any]) -> dict[str, Any]:
    small = {name: _SMALL.get(name, value) if value is not None else None for name, value in config.items()}
    return {name: _shrink(value) if name.endswith("_config") and value else value for name, value in small.items()}


def _chat_template(recipe: str) -> str:
    if recipe not in _CHAT_TEMPLATES:
        return CHAT_TEMPLATE
    return (importlib.resources.files("trl") / "chat_templates" / _CHAT_TEMPLATES[recipe]).read_text()
