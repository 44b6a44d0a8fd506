"""What travels from the trainer to the generator: the state of the adapter, and all of what is trained."""

from __future__ import annotations

from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trl_moe_ext.errors import ConfigError

__all__ = ["adapter_tensors", "check_all_travels"]


def adapter_tensors(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Copies on the CPU of the weights of an adapter, by their names in an adapter file.

    Sharded ones are gathered: every process has to call this.
    """
    return {name: _whole(tensor).to("cpu", copy=True) for name, tensor in _state(model, adapter_name).items()}


def check_all_travels(model: PeftModel, adapter_name: str) -> None:
    """Check, before anything is sharded, that the state of the adapter has every weight that is trained.

    Raises:
        ConfigError: some weight is trained that the generator would never see.
    """
    travelling = {_place(tensor) for tensor in _state(model, adapter_name).values()}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if not trained:
        raise ConfigError("the adapter trains nothing; check its target_modules")
    left = [name for name, weight in trained.items() if _place(weight) not in travelling]
    if left:
        raise ConfigError(
            f"{left[0]!r} is trained ({len(left)} such) but is no part of the adapter {adapter_name!r}, which is all "
            "that the generator is sent: it would go on with the old value. Freeze it, or make it a part of the "
            "adapter, for example with modules_to_save"
        )


def _state(model: PeftModel, adapter_name: str) -> dict[str, Any]:
    # Without frozen embeddings, which the generator has.
    found: dict[str, Any] = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return found


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _place(tensor: Tensor | nn.Parameter) -> tuple[int, int]:
    """Where in memory it is: a state is of the same memory as its model, whatever it calls the weights."""
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())
