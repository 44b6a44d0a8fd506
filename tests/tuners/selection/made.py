"""Profiles of a model with use that the test chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from tests.families import inputs
from trl_moe_ext.profiles.measure import measure_profile


def save_profile(
    model: nn.Module, model_type: str, path: Path, shares: Sequence[float] | Mapping[str, Sequence[float]], **more: int
) -> str:
    """Write a profile of the model to `path`, and return it as `expert_selection` takes it.

    Args:
        model: any.
        model_type: of it.
        path: of the file.
        shares: of the experts of each layer, or by the labels of layers.
        more: label -> tokens that the router saw, where it is not what was counted.
    """
    profile = measure_profile(model, [inputs(model_type)])
    layers = []
    for layer in profile.layers:
        own = tuple(shares[layer.label] if isinstance(shares, Mapping) else shares)
        tokens = more.get(layer.label, layer.tokens)
        layers.append(replace(layer, token_share=own, gate_score=own, tokens=tokens))
    replace(profile, layers=tuple(layers)).save(path)
    return f"profile:{path}"
