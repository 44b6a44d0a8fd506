"""Weights in float32 for as long as they are trained."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["restore_precision", "to_float32"]

# On a module, while its weights are in float32: what the dtype of each one was before.
_BEFORE = "_dtypes_before_float32"


def to_float32(module: nn.Module) -> None:
    """Turn half-precision weights of `module` into float32, and remember what they were."""
    for part in module.modules():
        before = vars(part).setdefault(_BEFORE, {})
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dtype in (torch.bfloat16, torch.float16):
                before[name] = parameter.dtype
                parameter.data = parameter.data.float()


def restore_precision(model: nn.Module) -> None:
    """Undo `to_float32` in all of `model`: a block calls a bare router with tokens in its own dtype."""
    for part in model.modules():
        for name, dtype in vars(part).pop(_BEFORE, {}).items():
            parameter = part._parameters.get(name)
            if parameter is not None:
                parameter.data = parameter.data.to(dtype)
