"""Balancing without a loss: after each step the biases that choose experts move towards an equal load."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
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
        biases: label of the router -> ``(E,)``, changed in place.
        counts: label -> ``(E,)`` how many tokens chose each expert in the step that ends, on all processes. Called in
            every process, so that all have the same biases.
        rate: how far they move.
    """

    def __init__(self, biases: Mapping[str, Tensor], counts: Callable[[], Mapping[str, Tensor]], rate: float) -> None:
        self._biases, self._counts, self._rate = biases, counts, rate

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
                bias.data.copy_(bias_step(bias.detach(), load.to(bias.device), self._rate))
