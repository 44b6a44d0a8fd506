"""Balancing without a loss: after each step the biases that choose experts move towards an equal load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_moe_ext.router.balancing import bias_step

__all__ = ["BiasBalancing"]


class BiasBalancing(TrainerCallback):  # type: ignore[misc]
    """Moves the biases of an adapter (arXiv 2408.15664), which take part in the choice of experts and are saved with it.

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
        for label, counted in self._counts().items():
            bias = self._biases[label]
            bias.copy_(bias_step(bias, counted.to(bias.device), self._rate))
