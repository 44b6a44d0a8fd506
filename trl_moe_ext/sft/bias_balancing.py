"""Balancing without a loss: after each step the biases that choose experts move towards an equal load."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.balancing import bias_step
from trl_moe_ext.tuners.moe_lora import router_biases

__all__ = ["BiasBalancing", "biases_to_move", "warn_of_idle_biases"]


def biases_to_move(model: Any) -> dict[str, Tensor]:
    """Label of the router -> the bias of its experts in the adapter that is trained.

    Raises:
        ConfigError: the adapter has no biases.
    """
    biases = _biases_of(model)
    if not biases:
        raise ConfigError(
            "router_bias_update_rate has no effect: the adapter has no biases to move. Use "
            "MoeLoraConfig(router_bias=True), on the command line --moe_router_bias, or leave it out"
        )
    return biases


def warn_of_idle_biases(model: Any) -> None:
    """Biases that were moved in an earlier run may stay as they are; new ones that nothing moves are a mistake."""
    biases = _biases_of(model)
    if biases and not any(bias.any() for bias in biases.values()):
        warnings.warn(
            "router_bias=True has no effect without router_bias_update_rate: the biases stay at zero, and routers run "
            "twice. Give a rate, such as 0.001, or leave router_bias out",
            RuntimeWarning,
            stacklevel=2,
        )


def _biases_of(model: Any) -> dict[str, Tensor]:
    """Those of the adapter that is trained; none without one."""
    return router_biases(model, model.active_adapter) if hasattr(model, "active_adapter") else {}


class BiasBalancing(TrainerCallback):  # type: ignore[misc]
    """Moves the biases of an adapter (arXiv 2408.15664): part of the choice of experts, and saved with it.

    Args:
        find_biases: label of the router -> ``(E,)``, changed in place. Called when training begins: by then FSDP2 has
            put other parameters in the place of those that the model was built with.
        counts: label -> ``(E,)`` how many tokens chose each expert in the step that ends, on all processes. Called in
            every process, so that all have the same biases.
        rate: how far they move.
    """

    def __init__(
        self,
        find_biases: Callable[[], Mapping[str, Tensor]],
        counts: Callable[[], Mapping[str, Tensor]],
        rate: float,
    ) -> None:
        self._find_biases, self._counts, self._rate = find_biases, counts, rate
        self._biases: Mapping[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the model was prepared for training, and a checkpoint loaded."""
        self._biases = self._find_biases()
        if state.global_step and not any(_whole(bias).any() for bias in self._biases.values()):
            warnings.warn(
                f"the biases of the experts are zero, though {state.global_step} steps are done: the checkpoint has "
                "none. FSDP leaves them out of one with FULL_STATE_DICT; use fsdp_state_dict_type: SHARDED_STATE_DICT",
                RuntimeWarning,
                stacklevel=2,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimizer's step."""
        loads: dict[int, Tensor] = {}
        counts = self._counts()
        for label in self._biases.keys() & counts.keys():  # layers whose experts are adapted
            # Routers of experts that share their weights, as in a tied encoder and decoder, share one bias.
            key = id(self._biases[label])
            loads[key] = loads[key] + counts[label] if key in loads else counts[label]
        for bias in {id(bias): bias for bias in self._biases.values()}.values():
            if (load := loads.get(id(bias))) is not None:
                _move(bias, load, self._rate)


@torch.no_grad()
def _move(bias: Tensor, load: Tensor, rate: float) -> None:
    """`bias_step` in place; every process that holds a part of the bias knows the whole load."""
    whole = _whole(bias)
    moved = bias_step(whole, load.to(whole.device), rate)
    if isinstance(bias, DTensor):
        moved = DTensor.from_local(moved, bias.device_mesh, run_check=False).redistribute(placements=bias.placements)
    bias.copy_(moved)


def _whole(bias: Tensor) -> Tensor:
    """``(E,)``, where FSDP2 has left a part of it in each process."""
    return bias.full_tensor() if isinstance(bias, DTensor) else bias.detach()
