"""How far the gradients of a peer are from those of the same experts in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trl_moe_ext.bench.build import build
from trl_moe_ext.bench.factors import Factors, factors_of
from trl_moe_ext.bench.peers import PeerUnavailableError, peer_named
from trl_moe_ext.bench.plan import Plan
from trl_moe_ext.bench.subjects import ExpertsAlone
from trl_moe_ext.bench.tolerances import relative_error
from trl_moe_ext.experts.layout import ExpertsLayout, expert_weights
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.kernels.low_rank import LowRank
from trl_moe_ext.kernels.reference import experts_mlp_reference

Tensors = dict[str, Tensor]


def gradient_errors(plan: Plan) -> dict[str, float]:
    """Relative errors of one step of the experts alone, with factors that are the same for all peers and not zero.

    Returns:
        ``output``, ``dX`` and ``dweights`` (of tokens and routing weights), and where the experts have factors ``dA``
        and ``dB``, each over all projections.

    Raises:
        PeerUnavailableError: the peer cannot adapt this model, or there is no reference for it.
    """
    peer = peer_named(plan.peer)
    subject = build(plan, peer.implementation)
    assert isinstance(subject, ExpertsAlone)
    layout = subject.layout
    if subject.is_block or layout.identity_experts or layout.has_post_norm:
        raise PeerUnavailableError("The reference has no form for more than two projections and a gate")
    model = peer.attach(subject, plan.rank)
    factors = factors_of(model, layout) if peer.adapts_experts else {}
    for number, projection in enumerate(factors.values()):
        projection.randomise(torch.Generator().manual_seed(2 + number))
    torch.manual_seed(1)
    grad, hidden, index, weights = subject.draw(plan.tokens)
    found = {"output": subject.step(model, grad, hidden, index, weights), "dX": hidden.grad, "dweights": weights.grad}
    for side in ("A", "B") if factors else ():
        found[f"d{side}"] = _joined(factors, side)
    inputs = (hidden.detach(), index, weights.detach(), grad)
    expected = _expected(subject.experts, layout, factors, *inputs)
    return {name: relative_error(_present(name, found[name]), expected[name]) for name in expected}


def _present(name: str, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise PeerUnavailableError(f"It computes no {name}")
    return gradient


def _joined(factors: dict[str, Factors], side: str) -> Tensor | None:
    """The gradients of one side of all projections in one row of numbers; None if one is missing."""
    parts = []
    for projection in factors.values():
        is_a = side == "A"
        stored, view = (projection.A, projection.expert_a) if is_a else (projection.B, projection.expert_b)
        if stored.grad is None:
            return None
        parts.append(view(stored.grad).reshape(-1))
    return torch.cat(parts)


def _expected(
    experts: nn.Module,
    layout: ExpertsLayout,
    factors: dict[str, Factors],
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    grad: Tensor,
) -> Tensors:
    """The same from the reference, one expert after the other, so that no stack is copied to float64."""
    x, w = (tensor.double().requires_grad_() for tensor in (hidden, weights))
    stacks = expert_weights(experts, layout)
    out = torch.zeros_like(x)
    gradients: dict[str, list[Tensor]] = {f"{name}.{side}": [] for name in factors for side in "AB"}
    for expert in range(layout.num_experts):
        updates = {
            name: _low_rank(projection, projection.experts.index(expert))
            for name, projection in factors.items()
            if expert in projection.experts
        }
        part = experts_mlp_reference(
            x,
            (index != expert).long(),  # expert 0 of one; 1 is a slot that nobody serves
            w,
            _one_expert(stacks, expert),
            **{f"{p.role}_updates": (updates[p.name],) if p.name in updates else () for p in layout.projections},
        )
        if part.requires_grad:  # not if no token came
            torch.autograd.backward(part, grad.double())
        out += part.detach()
        for name, update in updates.items():
            for side, leaf in (("A", update.A), ("B", update.B)):
                gradients[f"{name}.{side}"].append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    assert x.grad is not None
    assert w.grad is not None
    expected = {"output": out, "dX": x.grad, "dweights": w.grad}
    for side in "AB" if factors else "":
        expected[f"d{side}"] = torch.cat([torch.cat(gradients[f"{name}.{side}"]).reshape(-1) for name in factors])
    return expected


def _low_rank(factors: Factors, place: int) -> LowRank:
    def leaf(view: Any, stored: Tensor) -> Tensor:
        return view(stored.detach())[place : place + 1].double().requires_grad_()  # type: ignore[no-any-return]

    return LowRank(leaf(factors.expert_a, factors.A), leaf(factors.expert_b, factors.B), factors.scaling)


def _one_expert(stacks: ExpertsWeights, expert: int) -> ExpertsWeights:
    """That expert alone, in float64."""

    def one(stack: Tensor | None) -> Tensor | None:
        return None if stack is None else stack[expert : expert + 1].detach().double()

    names = ("up", "down", "up_bias", "down_bias", "gate")
    return stacks._replace(**{name: one(getattr(stacks, name)) for name in names})  # type: ignore[arg-type]
