"""accelerate: FSDP2 with `fsdp_cpu_ram_efficient_loading`, as TRL's own `fsdp2.yaml` has it, for models with buffers.

accelerate 1.15 takes every entry of the state dict for a sharded parameter, and ends with "'Tensor' object has no
attribute 'device_mesh'" at the first buffer. DeepSeek-V3, GLM and others keep a bias of their routers in one, and an
adapter for chosen experts keeps their indices.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trl_moe_ext.hosts.seams import find_seam

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["install"]

_SEAM = "accelerate.utils.fsdp_utils:fsdp2_load_full_state_dict"


def install() -> None:
    """Wrap how accelerate fills a sharded model from the first process; a second call does nothing.

    Raises:
        HostVersionError: the function is not where we know it, or takes something else.
    """
    load = find_seam(_SEAM, parameters=("accelerator", "model", "full_sd"))
    if not hasattr(load, "trl_moe_ext"):
        # `fsdp2_prepare_model`, in the same module, looks it up when it runs.
        sys.modules["accelerate.utils.fsdp_utils"].__dict__["fsdp2_load_full_state_dict"] = _with_buffers(load)


def _with_buffers(load: Any) -> Any:
    @functools.wraps(load)
    def fsdp2_load_full_state_dict(
        accelerator: Any, model: nn.Module, full_sd: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        whole = _not_sharded(model)
        if not whole or _takes_buffers(load, accelerator):
            return load(accelerator, model, full_sd, *args, **kwargs)
        load(accelerator, _ShardedPart(accelerator, model, full_sd, whole), full_sd, *args, **kwargs)
        return model

    fsdp2_load_full_state_dict.trl_moe_ext = True  # type: ignore[attr-defined]
    return fsdp2_load_full_state_dict


def _not_sharded(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict that every process has in full: buffers, and parameters that FSDP ignores."""
    import torch
    from torch.distributed.tensor import DTensor

    state = model.state_dict()
    return {
        key: kept for key, kept in state.items() if isinstance(kept, torch.Tensor) and not isinstance(kept, DTensor)
    }


def _takes_buffers(load: Any, accelerator: Any) -> bool:
    """Whether this accelerate loads buffers itself.

    Told by a model of one buffer and not by the version, which would not tell a patched accelerate. One that cannot
    fails at once and in every process alike, before anything is sent.
    """
    import torch

    probe = torch.nn.Sequential(torch.nn.Module())
    probe[0].register_buffer("buffer", torch.zeros(1, device="meta"))
    try:
        load(accelerator, probe, {"0.buffer": torch.ones(1)})
    except Exception as error:
        # Only the failure that we know is ours to prevent; any other is shown again, with the model itself.
        return not (isinstance(error, AttributeError) and error.name == "device_mesh")
    return True


class _ShardedPart:
    """A sharded model as accelerate takes it: its state dict has DTensors only, and the rest is added on loading.

    Args:
        accelerator: knows the device of this process.
        model: sharded, on the meta device.
        full_sd: what is to be loaded; that of the first process counts.
        whole: the tensors of the model that are not sharded; in every process the same names, shapes and dtypes.
    """

    def __init__(
        self, accelerator: Any, model: nn.Module, full_sd: Mapping[str, Tensor], whole: Mapping[str, Tensor]
    ) -> None:
        self._accelerator, self._model, self._full_sd, self._whole = accelerator, model, full_sd, whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Any]:
        return {key: kept for key, kept in self._model.state_dict().items() if key not in self._whole}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        received = {key: self._receive(key, kept) for key, kept in self._whole.items()}
        return self._model.load_state_dict({**state_dict, **received}, *args, **kwargs)

    def _receive(self, key: str, kept: Tensor) -> Tensor:
        """The first process' tensor, on the device that computes: FSDP offloads what it shards, and nothing else."""
        import torch
        import torch.distributed as dist

        device = self._accelerator.device
        if self._accelerator.is_main_process:
            tensor = self._full_sd[key].detach().to(device, kept.dtype).contiguous()
        else:
            tensor = torch.empty(kept.shape, dtype=kept.dtype, device=device)
        dist.broadcast(tensor, src=0)
        return tensor
