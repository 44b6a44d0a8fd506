"""Make the routers of a model choose the experts that were recorded (rollout routing replay, arXiv 2510.11370).

Two engines, or two versions of a policy, send some tokens to other experts, and the probabilities of these tokens have
little to do with each other. With the routes of the generator the trainer computes what the generator computed.

- Only the choice is replayed. The weights of the recorded experts are those that the family's own rule gives for the
  live logits (`Scoring`), so that gradients flow to a router that is trained. Biases and groups of experts, which take
  part in nothing but the choice, are left out.
- A token that the router sends to the recorded experts anyway, and a token without a record, is left as it is.
- Replay takes part in the recomputation of gradient checkpointing.

Legend: T tokens, K top_k, E experts of the router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_moe_ext.errors import ConfigError, LayoutError
from trl_moe_ext.router.hooks import RouterHooks, in_backward
from trl_moe_ext.router.mismatch import RoutingMismatch, differing_tokens, recorded_tokens
from trl_moe_ext.router.reading import Choice, read_call, read_output
from trl_moe_ext.router.record import RoutingRecord
from trl_moe_ext.router.rewrite import write_call, write_output
from trl_moe_ext.router.routers import Router
from trl_moe_ext.router.scoring import Scoring, recognise_scoring

__all__ = ["RoutingReplay"]

# Tokens that are enough to tell a rule from all others.
_ENOUGH = 256


class RoutingReplay(RouterHooks):
    """While it is attached, routers choose the experts of `record`.

        with RoutingReplay(find_routers(model)) as replay:
            replay.record = record
            model(**batch).loss.backward()
        replay.take_mismatch().metrics()

    Leave the record, and leave it attached, until the backward pass is over: under gradient checkpointing the routers
    run again in it. Non-reentrant checkpoints notice a record that was exchanged in between, and raise.

    A `RouterTrace` that was attached before sees what the routers would choose, one attached later what they choose.

    Args:
        routers: of a model, with or without adapters. Those that a record does not know are left as they are.
        compare_only: nothing is replayed: only the mismatch is measured, which works for every family.
    """

    def __init__(self, routers: Sequence[Router], *, compare_only: bool = False) -> None:
        super().__init__(routers)
        self._compare_only = compare_only
        self._record: RoutingRecord | None = None
        self._serial = 0
        # By name of the router: logits whose choice is still to come (in a backward pass or not), and the rule of the
        # weights with the number of tokens that it was found from.
        self._waiting: dict[tuple[str, bool], Tensor] = {}
        self._rules: dict[str, tuple[Scoring, int]] = {}
        # By label, of the last forward: tokens that were recorded, and those of them that were sent elsewhere.
        self._recorded: dict[str, Tensor] = {}
        self._differing: dict[str, Tensor] = {}
        self._mismatch = RoutingMismatch()

    @property
    def record(self) -> RoutingRecord | None:
        """The routes of the tokens of the forwards to come, all tokens of a batch in their order; None for no replay.

        A record on the device of the model is not sent there by every layer.

        Raises:
            ConfigError: the record is of another model.
        """
        return self._record

    @record.setter
    def record(self, record: RoutingRecord | None) -> None:
        if record is not None:
            record.check_routers(self._routers)
        self._add_mismatch()
        self._serial += record is not self._record
        self._record = record

    def take_mismatch(self) -> RoutingMismatch:
        """How many tokens the routers would have sent to other experts than the recorded ones, since the last call.

        Each record is counted once, at its last forward. While routes are replayed, a layer is compared after those
        before it were replayed.
        """
        self._add_mismatch()
        taken, self._mismatch = self._mismatch, RoutingMismatch()
        return taken

    def remove(self) -> None:
        """Stop, and forget the record; nothing happens if it is not attached."""
        super().remove()
        self._waiting.clear()
        self.record = None

    def _after_router(self, router: Router, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._record is None or router.label not in self._record.experts:
            return None
        logits, live = read_output(output, router)
        if live is not None:
            found = self._choose(router, logits, live)
            return None if found is None else _written(router, write_output(output, router, *found))
        waiting = router.name, in_backward()
        if router.experts_module is None or (waiting in self._waiting and not in_backward()):
            raise _refusal(router, "its output does not hold the choice, and its experts were not called after it")
        self._waiting[waiting] = logits
        return None

    def _before_experts(
        self, router: Router, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        logits = self._waiting.pop((router.name, in_backward()), None)
        if logits is None:
            return None
        live = read_call([*args, *kwargs.values()], len(logits), router)
        if live is None:
            raise _refusal(router, "neither its output nor the call of its experts holds the choice")
        found = self._choose(router, logits, live)
        return None if found is None else _written(router, write_call(args, kwargs, router, *found))

    def _choose(self, router: Router, logits: Tensor, live: Choice) -> tuple[Tensor, Tensor] | None:
        """Experts and weights for all tokens, or None to leave the live ones."""
        recorded = self._record_of(router, len(logits)).to(logits.device, torch.int64)
        differs = differing_tokens(recorded, live.top_k_index)
        if not in_backward():
            self._recorded[router.label], self._differing[router.label] = recorded_tokens(recorded), differs
        if self._compare_only or not len(logits):
            return None
        rule = self._rule(router, logits, live)
        assert live.top_k_weights is not None
        index = torch.where(differs.unsqueeze(1), recorded, live.top_k_index)
        weights = rule.weights(logits, index).to(live.top_k_weights.dtype)
        weights = torch.where(differs.unsqueeze(1), weights, live.top_k_weights)
        return index, _Stamp.apply(weights, self._serial)  # type: ignore[no-untyped-call]

    def _record_of(self, router: Router, num_tokens: int) -> Tensor:
        assert self._record is not None
        recorded = self._record.experts[router.label]
        if len(recorded) != num_tokens:
            raise ConfigError(
                f"the record is of {len(recorded)} tokens, but {router.name!r} saw {num_tokens}; give a record of all "
                "tokens of the batch, with blank rows for padding, before each forward"
            )
        return recorded

    def _rule(self, router: Router, logits: Tensor, live: Choice) -> Scoring:
        known, seen = self._rules.get(router.name, (None, 0))
        if known is None or seen < min(len(logits), _ENOUGH):
            weights = live.top_k_weights
            found = None if weights is None else recognise_scoring(logits, live.top_k_index, weights)
            if found is None:
                raise _refusal(router, "the weights of its experts do not follow from its logits by a known rule")
            self._rules[router.name] = found, len(logits)
            return found
        return known

    def _add_mismatch(self) -> None:
        self._mismatch += RoutingMismatch.of(self._recorded, self._differing)
        self._recorded, self._differing = {}, {}


class _Stamp(torch.autograd.Function):
    """The identity, which saves the number of the record for the backward pass.

    It is saved as the shape of an empty tensor. A non-reentrant checkpoint compares the shapes of what is saved in the
    forward and in its recomputation: gradients of a mixture of two routings cannot pass unnoticed.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, serial: int) -> Tensor:
        ctx.save_for_backward(weights.new_empty(0, serial))
        return weights.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _written(router: Router, written: Any | None) -> Any:
    if written is None:
        raise _refusal(router, "its output tells the choice in a form in which another cannot be put back")
    return written


def _refusal(router: Router, why: str) -> LayoutError:
    return LayoutError(
        f"routes of {router.name!r} ({type(router.own).__name__}) cannot be replayed: {why}. Switch routing replay "
        "off for this model, or report its family"
    )
