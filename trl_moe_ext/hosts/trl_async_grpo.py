"""TRL's async GRPO on machines and dtypes that its packing has no kernel for.

Its trainer asks the GPU for its name, its packing fetches a flash attention kernel from the Hub, and a client of a
vLLM server is made whether one is used or not. Each of them is kept where it works, and stood in for where it can't.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trl_moe_ext.grpo.batches.tree_attention import varlen_attention
from trl_moe_ext.grpo.trl_async import packing_module, trainer_module
from trl_moe_ext.hosts.seams import find_seam

__all__ = ["TreeKernel", "install"]


def install() -> None:
    """Put the stand-ins in their places; again it does nothing.

    Raises:
        HostVersionError: one of the places is not where we know it.
    """
    trainer, packing = trainer_module.__name__, packing_module.__name__
    peak_flops = find_seam(f"{trainer}:get_peak_flops_per_device", parameters=("accelerator", "dtype"))
    flash_attention = find_seam(f"{packing}:_flash_attn")
    client = find_seam(f"{trainer}:VLLMClient", parameters=("server_url", "server_timeout"))
    if hasattr(peak_flops, "trl_moe_ext"):
        return
    kernel = TreeKernel(flash_attention)
    vars(trainer_module)["get_peak_flops_per_device"] = _marked(_peak_flops_of_gpus(peak_flops))
    vars(packing_module)["_flash_attn"] = lambda: kernel
    vars(trainer_module)["VLLMClient"] = _client_when_needed(client)


class TreeKernel:
    """What TRL takes for the module of a flash attention kernel.

    Args:
        fetch: gets the kernel that TRL would take; asked once, and only for tensors that it is for.
    """

    def __init__(self, fetch: Callable[[], Any]) -> None:
        self._fetch = fetch

    def flash_attn_varlen_func(self, query: Tensor, *others: Any, **options: Any) -> Any:
        """Attention by the kernel for half precision on a GPU, if it can be had; else by PyTorch."""
        has_kernel = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
        kernel = self._kernel if has_kernel else None
        function = varlen_attention if kernel is None else kernel.flash_attn_varlen_func
        return function(query, *others, **options)

    @functools.cached_property
    def _kernel(self) -> Any | None:
        try:
            return self._fetch()
        except Exception as error:  # whatever a download, a package or a driver may raise
            warnings.warn(
                "the flash attention kernel of TRL's packing can't be had, so PyTorch's attention takes its place, "
                f"which is slower ({type(error).__name__}: {error}). To have it: pip install kernels, and access to "
                "the Hub",
                RuntimeWarning,
                stacklevel=2,
            )
            return None


def _peak_flops_of_gpus(stock: Callable[..., float | None]) -> Callable[..., float | None]:
    @functools.wraps(stock)
    def get_peak_flops_per_device(accelerator: Any, dtype: str) -> float | None:
        return stock(accelerator, dtype) if accelerator.device.type == "cuda" else None

    return get_peak_flops_per_device


def _client_when_needed(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock, updated=())
    def client(*args: Any, **kwargs: Any) -> Any:
        try:
            return stock(*args, **kwargs)
        except ImportError as error:
            return _NoClient(error)

    return client


class _NoClient:
    """A client that can't be made, of which nobody is to ask anything."""

    def __init__(self, reason: ImportError) -> None:
        self.__dict__["reason"] = reason

    def __getattr__(self, name: str) -> Any:
        raise self.__dict__["reason"]


def _marked(function: Any) -> Any:
    function.trl_moe_ext = True
    return function
