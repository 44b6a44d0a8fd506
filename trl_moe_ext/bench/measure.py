"""Time and memory of training steps of one peer, in the process that calls it."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trl_moe_ext.bench.build import build
from trl_moe_ext.bench.memory import peak, reset_peak
from trl_moe_ext.bench.peers import peer_named
from trl_moe_ext.bench.plan import Plan
from trl_moe_ext.errors import MoeExtError

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Measured:
    """One round of one peer.

    Attributes:
        seconds: of each timed step.
        extra_bytes: the most that the steps held over the idle model; None where the system does not tell.
        trained_bytes: trained parameters, their gradients and the states that AdamW keeps of them.
    """

    seconds: list[float]
    extra_bytes: int | None
    trained_bytes: int = 0

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def measure(plan: Plan) -> Measured:
    """Time forward and backward on new random inputs in every step.

    Raises:
        PeerUnavailableError: the peer cannot adapt this model.
        MoeExtError: a step made numbers that are not finite.
    """
    peer, device = peer_named(plan.peer), torch.device(plan.device)
    subject = build(plan, peer.implementation)
    model = peer.attach(subject, plan.rank)
    torch.manual_seed(1)  # every peer sees the same tokens, whatever its factors took from the generator
    idle = reset_peak(device)
    seconds = []
    for step in range(WARM_UP_STEPS + plan.steps):
        inputs = subject.draw(plan.tokens)
        start = _now(device)
        out = subject.step(model, *inputs)
        end = _now(device)
        if not torch.isfinite(out).all():
            raise MoeExtError(f"step {step} of {plan.peer} gives numbers that are not finite; nothing was measured")
        if step >= WARM_UP_STEPS:
            seconds.append(end - start)
        if step < WARM_UP_STEPS + plan.steps - 1:
            model.zero_grad(set_to_none=True)
        del inputs, out
    most = peak(device)
    return Measured(seconds, None if idle is None or most is None else most - idle, trained_bytes(model))


def trained_bytes(model: nn.Module) -> int:
    """Bytes of the trained parameters, of their gradients and of AdamW's states after a step, which is taken.

    Args:
        model: after a backward pass.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return 0
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *gradients, *states))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
