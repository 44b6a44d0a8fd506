"""The routing of the forward passes that count, out of all that a trainer runs for one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl_moe_ext.router.passes import as_it_was, forked_rng, routing_options
from trl_moe_ext.router.routers import Router
from trl_moe_ext.router.trace import RouterTrace, Routing

__all__ = ["RouterWatch", "has_base", "kept_tokens", "routing_inputs"]


class RouterWatch:
    """Collects routings while asked to; at other times there is no hook on the model.

    TRL runs a model a second time for one batch where it needs the logits as well, or only for its metrics: the first
    pass is the one that is trained and measured.

    Args:
        model: the model that is called, without the wrappers of distributed training.
        routers: its routers.
    """

    def __init__(self, model: nn.Module, routers: Sequence[Router]) -> None:
        self._model = model
        self._seen: list[Routing] = []
        self._passes = 0
        self._trace = RouterTrace(routers, self._observe)

    @contextmanager
    def first_pass(self, kept: Tensor | None) -> Iterator[list[Routing]]:
        """A list that fills with the routing of every router in the first forward inside. Not to be nested.

        Args:
            kept: bool mask of the tokens that count, ``(B, L)``; None if all do.
        """
        self._seen, self._passes, self._trace.kept = [], 0, kept
        counting = self._model.register_forward_pre_hook(self._count_pass)
        try:
            with self._trace:
                yield self._seen
        finally:
            counting.remove()
            self._seen, self._trace.kept = [], None

    @torch.no_grad()
    def base_pass(self, inputs: Mapping[str, Any]) -> list[Routing]:
        """The routing of the model without its adapters, and without what training adds to it, for the same inputs."""
        model: Any = self._model
        with self.first_pass(kept_tokens(inputs)) as seen, forked_rng(model), as_it_was(model):
            model.eval()
            with model.disable_adapter():
                model(**routing_inputs(model, inputs))
        return seen

    def _count_pass(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._passes += 1

    def _observe(self, routing: Routing) -> None:
        if self._passes == 1:
            self._seen.append(routing)


def has_base(model: Any) -> bool:
    """Whether a model can run without its adapter and see the same tokens; prompt learning adds tokens of its own."""
    adapters = getattr(model, "peft_config", None)
    if not adapters or not hasattr(model, "disable_adapter"):
        return False
    return not any(config.is_prompt_learning for config in adapters.values())


def kept_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens of a batch count, ``(B, L)``: all but padding; None if there is no padding."""
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def routing_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What to call a model with when only its routing is wanted: no loss, no cache, and the logits of one token."""
    chosen = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
    return chosen | routing_options(model, chosen)
