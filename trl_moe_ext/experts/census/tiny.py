"""A tiny random model of a model type, from its config class alone."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from trl_moe_ext.errors import ConfigError, MoeExtError
from trl_moe_ext.experts.census import family
from trl_moe_ext.experts.census.model_class import model_class
from trl_moe_ext.experts.census.shrink import Shrinker
from trl_moe_ext.experts.census.weights import randomise


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The default config of `model_type`, shrunk to a few thousand weights a layer.

    Args:
        model_type: as in ``config.json``; also a type that only occurs inside a composite config.
        overrides: attributes to set. For a nested config a mapping of its attributes, in which ``model_type`` puts
            another type in its place.

    Raises:
        ConfigError: transformers knows no such type.
        MoeExtError: the family's config class refuses its default or its tiny attributes.
    """
    cls = family.config_class(model_type)
    with _named(model_type, "a tiny config"):
        return Shrinker()(cls(), overrides)


def build(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model of `model_type` on the CPU, in evaluation mode, the same for the same `seed`.

    Args:
        model_type: as for `tiny_config`.
        dtype: of the weights. What the family keeps in float32 stays so, as when it is loaded.
        seed: of the weights.
        overrides: as for `tiny_config`.

    Raises:
        ConfigError: transformers knows no such type.
        MoeExtError: the model cannot be built.
    """
    config = tiny_config(model_type, **overrides)
    with _named(model_type, "a tiny model"), torch.random.fork_rng(devices=[]), _unwritten_memory_is_nan():
        torch.manual_seed(seed)
        cls = model_class(config)
        model: PreTrainedModel = cls._from_config(config, dtype=torch.float32)
        randomise(model, torch.Generator().manual_seed(seed))
        if dtype != torch.float32:
            model = _cast(model, cls, dtype)
    return model.eval()


def skeleton(model_type: str, **overrides: Any) -> PreTrainedModel:
    """The model that `build` makes, on the meta device: its modules and shapes, without weights.

    Raises:
        ConfigError: transformers knows no such type.
        MoeExtError: the model cannot be built.
    """
    config = tiny_config(model_type, **overrides)
    with _named(model_type, "a tiny model"), torch.device("meta"):
        model: PreTrainedModel = model_class(config)(config)
    return model


def _cast(model: PreTrainedModel, cls: type[PreTrainedModel], dtype: torch.dtype) -> PreTrainedModel:
    """`model` as if it had been loaded in `dtype`: computed buffers and what has to stay float32 are not cast."""
    cast: PreTrainedModel = cls._from_config(model.config, dtype=dtype)
    # In float64 too: the forward of such a part calls `float()` on what it is given.
    kept = [re.compile(pattern.replace("*", ".*")) for pattern in cast._keep_in_fp32_modules_strict or ()]
    for name, tensor in itertools.chain(cast.named_parameters(), cast.named_buffers()):
        if any(pattern.search(name) for pattern in kept):
            tensor.data = tensor.data.float()
    cast.load_state_dict(model.state_dict())
    return cast


@contextlib.contextmanager
def _named(model_type: str, what: str) -> Iterator[None]:
    """Errors of transformers get the name of the type that they are about."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        todo = (
            "install what it needs"
            if isinstance(error, ImportError)
            else "if the family needs attributes that the rules cannot know, add them to experts/census/overrides.py"
        )
        raise MoeExtError(
            f"{what} of type {model_type!r} cannot be built: {type(error).__name__}: {error}; {todo}"
        ) from error


@contextlib.contextmanager
def _unwritten_memory_is_nan() -> Iterator[None]:
    """Weights that no initialisation writes are NaN, not whatever the memory held: that makes them seen and equal."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
