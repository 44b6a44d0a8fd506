"""Tiny random models of the MoE families of transformers, from a table of configurations."""

from __future__ import annotations

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trl_moe_ext.experts.layout import read_layout


@cache
def _table() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "data" / "tiny_families.json").read_text())


def interface_families() -> list[str]:
    """Model types whose experts go through transformers' experts interface."""
    return [name for name, entry in _table().items() if entry["via_experts_interface"]]


def other_families() -> list[str]:
    """Model types with experts outside the interface, that take token ids."""
    return [n for n, e in _table().items() if not e["via_experts_interface"] and e["inputs"] == "input_ids"]


def build(model_type: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with random weights, none of them zero: a part that starts at zero would hide mistakes."""
    entry = _table()[model_type]
    config = getattr(transformers, entry["config_class"])(**entry["kwargs"])
    torch.manual_seed(0)
    if entry["auto_class"]:
        model = getattr(transformers, entry["auto_class"]).from_config(config)
    else:
        module, _, name = entry["model_class"].partition(":")
        model = getattr(importlib.import_module(module), name)(config)
    for module in model.modules():
        if read_layout(module) is not None:
            randomise(module)
    return model.to(dtype).eval()


@cache
def experts_classes() -> dict[str, str]:
    """Model types beyond the table of tiny models -> the class of their experts, which goes through the interface."""
    return json.loads((Path(__file__).parent / "data" / "experts_classes.json").read_text())


# Whatever of these a config knows: families call the same sizes by different names.
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "moe_hidden_size": 32,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_local_experts": 8,
}


def build_experts(model_type: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random module of experts alone, from the family's default config with small sizes."""
    config_class = CONFIG_MAPPING[model_type]
    config = config_class()
    for name, size in _SMALL.items():
        if hasattr(config, name):
            setattr(config, name, size)
    modeling = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    experts = getattr(modeling, experts_classes()[model_type])(config)
    randomise(experts)
    return experts.to(dtype)


def inputs(model_type: str) -> dict[str, Tensor]:
    """Arguments of the model's forward: a batch of two short sequences, or a few patches of an image."""
    generator = torch.Generator().manual_seed(1)
    if _table()[model_type]["inputs"] == "input_ids":
        return {"input_ids": torch.randint(3, 100, (2, 12), generator=generator)}
    kwargs = _table()[model_type]["kwargs"]
    pixels = 3 * kwargs["patch_size"] ** 2
    return {"pixel_values": torch.randn(16, pixels, generator=generator), "grid_thw": torch.tensor([[1, 4, 4]])}


def experts_of(model: nn.Module) -> nn.Module:
    """The first module of routed experts."""
    return next(module for module in model.modules() if read_layout(module) is not None)


def randomise(experts: nn.Module) -> None:
    """Weights with outputs of order one, biases and norms that are neither zero nor one."""
    generator = torch.Generator().manual_seed(2)
    for parameter in experts.parameters():
        scale = min(parameter.shape[-2:]) ** -0.5 if parameter.ndim == 3 else 0.5
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale


def randomise_factors(model: nn.Module, adapter: str = "default") -> None:
    """Low-rank factors large enough that dropping them could not pass for rounding."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter.dtype)
