"""Watch what the routers of a model decide, while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.router.hooks import RouterHooks, in_backward
from trl_moe_ext.router.reading import Choice, read_call, read_output
from trl_moe_ext.router.routers import ADVICE, Router
from trl_moe_ext.router.scoring import Scores, as_probabilities, recognise_scores
from trl_moe_ext.router.tokens import only_kept

__all__ = ["RouterTrace", "Routing"]


@dataclass(frozen=True, eq=False)
class Routing:
    """What one router decided in one forward, about T tokens.

    Attributes:
        router: which one.
        logits: ``(T, E)`` in the dtype of the family, with a graph where gradients are on. For a router that hands out
            probabilities, those.
        top_k_index: ``(T, K)`` int64, the chosen experts.
        top_k_weights: ``(T, K)``, their weights, or None for a family that does not show them. Zero where an expert
            had no room for the token.
        kept: ``(T,)`` bool, False on padding; None if every token counts or the mask is not for these tokens.
        scores: how the logits become scores; recognised if it is None.
    """

    router: Router
    logits: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor | None
    kept: Tensor | None
    scores: Scores | None = None

    @cached_property
    def probabilities(self) -> Tensor:
        """``(T, E)`` float32, which sum to one over the experts, with a graph if the logits have one.

        They are the family's own scores, and the softmax of the logits where those are not recognised. Rows of padding
        are those of logits that are zero: what stands there, a NaN perhaps, must not reach the gradient.
        """
        scores = self.scores or recognise_scores(self.logits, self.top_k_index, self.top_k_weights)
        return as_probabilities(only_kept(self.logits, self.kept), scores or "softmax")


class RouterTrace(RouterHooks):
    """Calls `observe` with the routing of every forward of every router.

    Each forward is seen once: when gradient checkpointing computes a layer again for the backward pass, nothing is
    told. Under reentrant checkpointing the forward that is seen runs without gradients, and its logits have no graph:
    ``routing.logits.requires_grad`` tells. Otherwise the observer may compute a loss with them, in a checkpoint too.
    Nothing is kept here; what the observer keeps is all the memory it takes.

    Attributes:
        kept: tokens that count in the forwards to come, bool ``(T,)`` or ``(B, L)``, or None for all. Routers that see
            another number of tokens, such as those of an image tower, ignore it.
    """

    def __init__(self, routers: Sequence[Router], observe: Callable[[Routing], None]) -> None:
        super().__init__(routers)
        self.kept: Tensor | None = None
        self._observe = observe
        self._pauses = 0
        # By name of the router: logits whose choice is still to come, and how logits become scores.
        self._waiting: dict[str, Tensor] = {}
        self._scores: dict[str, Scores] = {}

    def remove(self) -> None:
        """Stop watching; nothing happens if it is not watching."""
        super().remove()
        self._waiting.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forwards inside are not seen."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def _after_router(self, router: Router, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._is_blind():
            return
        with _outside_checkpoint():
            logits, choice = read_output(output, router)
            if choice is not None:
                self._tell(router, logits, choice)
            elif router.experts_module is None or router.name in self._waiting:
                raise _unreadable(router, "its experts were not called after it")
            else:
                self._waiting[router.name] = logits

    def _before_experts(
        self, router: Router, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if self._is_blind() or router.name not in self._waiting:
            return
        logits = self._waiting.pop(router.name)
        with _outside_checkpoint():
            choice = read_call([*args, *kwargs.values()], len(logits), router)
            if choice is None:
                raise _unreadable(router, "its experts are not called with them either")
            self._tell(router, logits, choice)

    def _is_blind(self) -> bool:
        return self._pauses > 0 or in_backward()

    def _tell(self, router: Router, logits: Tensor, choice: Choice) -> None:
        if router.name not in self._scores and len(logits):
            self._scores[router.name] = recognise_scores(logits, *choice) or "softmax"
        scores = self._scores.get(router.name)
        self._observe(Routing(router, logits, *choice, self._kept_of(logits), scores))

    def _kept_of(self, logits: Tensor) -> Tensor | None:
        if self.kept is None or self.kept.numel() != len(logits):
            return None
        return self.kept.reshape(-1).to(logits.device, torch.bool)


def _outside_checkpoint() -> saved_tensors_hooks:
    """What autograd saves inside is kept as it is.

    A checkpoint counts what is saved in a forward and expects the same of its recomputation, in which the trace does
    nothing. So what the observer computes, such as a loss, must not be saved by the checkpoint.
    """
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _unreadable(router: Router, why: str) -> LayoutError:
    return LayoutError(
        f"the experts that {router.name!r} ({type(router.own).__name__}) chose cannot be read: its output does "
        f"not hold {router.top_k} for each token, and {why}. If adapters were attached since, find the routers again. "
        f"{ADVICE}"
    )
