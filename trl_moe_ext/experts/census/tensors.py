"""What a tiny model takes and what it gives: forward arguments and the output to compare, by the forward signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.experts.census.overrides import EMBEDDINGS_ONLY
from trl_moe_ext.experts.census.rules import HIDDEN, VOCABULARY
from trl_moe_ext.experts.census.tiny import build

BATCH, LENGTH = 2, 12
# Below are padding, begin and end, above the special tokens of other modalities.
_FIRST_TOKEN, _PAST_LAST_TOKEN = 16, VOCABULARY - 48
_GRID = torch.tensor([[1, 4, 4], [1, 4, 8]])  # frames, rows and columns of patches of two images


def inputs(model: PreTrainedModel | str, seed: int = 0) -> dict[str, Tensor]:
    """Forward arguments for a tiny model.

    Args:
        model: the model, or its type.
        seed: of the values.

    Returns:
        Token ids ``(2, 12)`` where the model takes tokens, with those of the decoder where it takes them too; else the
        pixels of two images and what goes with them; else embeddings ``(2, 12, H)``. Floating-point arguments have the
        dtype of the model.

    Raises:
        MoeExtError: the model has no forward of its own, only parts that have.
    """
    model = build(model) if isinstance(model, str) else model
    if type(model).forward is nn.Module.forward:
        parts = ", ".join(name for name, _ in model.named_children())
        raise MoeExtError(f"{type(model).__name__} has no forward of its own: take one of its parts, {parts}")
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    if "input_ids" in names and model.config.model_type not in EMBEDDINGS_ONLY:
        tokens = [name for name in ("input_ids", "decoder_input_ids") if name in names]
        return {name: _tokens(generator) for name in tokens}
    if "pixel_values" in names:
        found = _pixels(model.config, names, generator)
    else:
        found = {"inputs_embeds": torch.randn(BATCH, LENGTH, HIDDEN, generator=generator)}
    return {name: tensor.to(model.dtype) if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def output(model: PreTrainedModel, arguments: dict[str, Tensor]) -> Tensor:
    """The logits of the model, else its last hidden state, else its last feature map.

    Raises:
        MoeExtError: the model gave none of them.
    """
    result = model(**arguments)
    for name in ("logits", "last_hidden_state", "feature_maps", "heatmaps"):
        found: Any = getattr(result, name, None)
        if found is not None:
            tensor: Tensor = found[-1] if isinstance(found, tuple | list) else found
            return tensor
    raise MoeExtError(f"{type(model).__name__} gave neither logits nor hidden states but {sorted(result)}")


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(_FIRST_TOKEN, _PAST_LAST_TOKEN, (BATCH, LENGTH), generator=generator)


def _pixels(config: PreTrainedConfig, names: Iterable[str], generator: torch.Generator) -> dict[str, Tensor]:
    """Images ``(2, C, height, width)``, or the patches of two images with their grids, ``(2, 3)``."""
    vision = next(each for each in _configs(config) if hasattr(each, "patch_size"))
    channels: int = getattr(vision, "num_channels", getattr(vision, "in_channels", 3))
    found: dict[str, Tensor] = {}
    grid_name = next((name for name in names if name.endswith("grid_thw")), None)
    if grid_name is None:
        size = vision.image_size
        sides = size if isinstance(size, list | tuple) else (size, size)
        found["pixel_values"] = torch.randn(BATCH, channels, *sides, generator=generator)
    else:
        pixels = channels * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1)
        found["pixel_values"] = torch.randn(int(_GRID.prod(1).sum()), pixels, generator=generator)
        found[grid_name] = _GRID.clone()
    if "dataset_index" in names:  # the expert of each image, in a model that has one for each data set
        found["dataset_index"] = torch.arange(BATCH)
    return found


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)
