"""Whether Triton's kernels can do the work on some rows: on a GPU, where Triton is installed and works."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from trl_moe_ext.kernels.gates import Gate

__all__ = ["takes"]


def takes(rows: Tensor) -> bool:
    """Whether they can have these rows. Under torch.compile torch is used, whose compiler fuses by itself."""
    if rows.device.type != "cuda" or torch.compiler.is_compiling() or isinstance(rows, FakeTensor):
        return False
    known = rows.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return known and rows.numel() > 0 and _works_on(rows.device)


@functools.cache
def _works_on(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from trl_moe_ext.kernels import triton_rows

        triton_rows.gated(Gate("silu"), torch.ones(1, 1, device=device))
    except Exception as error:  # whatever a compiler, a driver or an old card may raise
        warnings.warn(
            f"Triton is installed but does not work on {device}, so torch does the work of its kernels, which is "
            f"slower ({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
