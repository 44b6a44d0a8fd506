"""Forwards of which nothing but the routing is wanted: what they are called with, and what they leave as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["as_it_was", "forked_rng", "routing_options"]


def routing_options(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a forward beside its `inputs`: no cache, and the logits of one token."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The stock forward: TRL's trainer puts another one, with other arguments, on the instance.
    known = inspect.signature(type(base).forward).parameters
    is_language_model = "input_ids" in inputs and any(p.kind is p.VAR_KEYWORD for p in known.values())
    cache = {"use_cache": False} if "use_cache" in known or is_language_model else {}
    return cache | ({"logits_to_keep": 1} if "logits_to_keep" in known else {})


@contextmanager
def forked_rng(model: nn.Module) -> Iterator[None]:
    """Random numbers drawn inside are drawn again afterwards, on the CPU and on the devices of a model."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes and gradients of a model are the same afterwards, parameter by parameter.

    Where an adapter is switched on again, PEFT makes all of it trainable: what a user has frozen in it, too.
    """
    training = [module for module in model.modules() if module.training]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter, is_trained in gradients:
            if parameter.requires_grad is not is_trained:
                parameter.requires_grad_(is_trained)
