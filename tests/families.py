"""Tiny random models of the MoE families of transformers."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor, nn

from trl_moe_ext.experts import census
from trl_moe_ext.experts.census import build
from trl_moe_ext.experts.reading import read_layout

__all__ = ["COMPOSITES", "FAMILIES", "build", "experts_of", "inputs", "randomise_factors"]

_TYPES = json.loads((Path(__file__).parent / "data" / "model_types.json").read_text())
# All model types of transformers 5.23 with routed experts of their own, and those that nest one of them.
FAMILIES: list[str] = _TYPES["own"]
COMPOSITES: list[str] = _TYPES["composite"]


def inputs(model_type: str) -> dict[str, Tensor]:
    """Arguments of the model's forward: a batch of two short sequences, or a few patches of an image."""
    return census.inputs(census.skeleton(model_type))


def experts_of(model: nn.Module) -> nn.Module:
    """The first module of routed experts."""
    return next(module for module in model.modules() if read_layout(module) is not None)


def randomise_factors(model: nn.Module, adapter: str = "default") -> None:
    """Low-rank factors large enough that dropping them could not pass for rounding."""
    census.randomise_factors(model, adapter, seed=3)
