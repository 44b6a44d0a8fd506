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
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.tiny_checkpoints import VOCAB_SIZE, byte_tokenizer

# The models' own chat templates, of which TRL has copies, and the token that ends an answer.
_CHAT_TEMPLATES = {
    "qwen3_30b_a3b_sft": ("qwen3_instruct_2507.jinja", "<|im_end|>"),
    "gemma4_26b_a4b_sft": ("gemma4.jinja", "<turn|>"),
    "gpt_oss_20b_sft": ("gptoss.jinja", "<|return|>"),
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
    """Save a checkpoint like the published one, with small sizes and random weights, and a tokenizer."""
    torch.manual_seed(0)
    _build(_shrink(_published(recipe))).save_pretrained(directory)
    _tokenizer(recipe).save_pretrained(directory)
    if recipe == "gpt_oss_20b_sft":
        _pack_experts(directory)


def _published(recipe: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "data" / "recipe_configs" / f"{recipe}.json").read_text())


def _build(config: dict[str, Any]) -> nn.Module:
    options = {name: value for name, value in config.items() if name != "model_type"}
    architecture = getattr(transformers, config["architectures"][0])
    return architecture(transformers.AutoConfig.for_model(config["model_type"], **options))


def _shrink(config: dict[str, Any]) -> dict[str, Any]:
    small = {name: _SMALL.get(name, value) for name, value in config.items() if value is not None}
    return {name: _shrink(value) if name.endswith("_config") else value for name, value in small.items()}


def _tokenizer(recipe: str) -> PreTrainedTokenizerFast:
    if recipe not in _CHAT_TEMPLATES:
        return byte_tokenizer()
    file, eos_token = _CHAT_TEMPLATES[recipe]
    template = (importlib.resources.files("trl") / "chat_templates" / file).read_text()
    return byte_tokenizer(template, eos_token)


def _pack_experts(directory: Path) -> None:
    """Replace the experts' weights by random ones in MXFP4: two values of four bits a byte, a scale for 32 of them."""
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = tensor.shape
            blocks = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
            # The exponent has a bias of 127, and the largest value of four bits is 6.
            tensors[f"{name}_scales"] = torch.full(blocks, 127 - 6, dtype=torch.uint8)
        else:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
