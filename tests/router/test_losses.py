"""Router losses: values and gradients against formulas written down again, shares that add up, and padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from tests.router.observed import split_routings
from tests.tolerances import relative_error
from trl_moe_ext.plugins import PluginHost
from trl_moe_ext.router.losses import LossInput, drift_kl, kl_divergence, load_balancing, z_loss
from trl_moe_ext.router.tokens import count_choices

LOSSES: dict[str, Callable[[LossInput], Tensor]] = {
    "load_balancing": load_balancing,
    "z_loss": z_loss,
    "drift_kl": drift_kl,
}


@dataclass(frozen=True)
class Case:
    """One micro-batch of a step that has others as well: T = 6 tokens, K = 2 of E = 5 experts."""

    scores: str
    kept: Tensor | None
    logits: Tensor  # (T, E) float64
    base_logits: Tensor
    tokens_per_expert: Tensor
    num_tokens: float
    top_k: int = 2

    def input(self, logits: Tensor) -> LossInput:
        """The record for these logits, with probabilities that hang on them."""
        base = probabilities_of(self.scores, self.base_logits)
        probabilities = probabilities_of(self.scores, logits.to(torch.promote_types(logits.dtype, torch.float32)))
        return LossInput(
            logits,
            probabilities,
            self.kept,
            self.tokens_per_expert,
            self.num_tokens,
            self.top_k,
            base.to(probabilities.dtype),
        )


def probabilities_of(scores: str, logits: Tensor) -> Tensor:
    if scores == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)


def make_case(scores: str, padded: bool) -> Case:
    generator = torch.Generator().manual_seed(7)
    logits, base_logits = 2 * torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    kept = torch.tensor([True, True, False, True, True, False]) if padded else None
    elsewhere = torch.tensor([9, 0, 3, 1, 5])  # Nine more tokens in other micro-batches.
    counts = count_choices(logits.topk(2, -1).indices, 5, kept) + elsewhere
    return Case(scores, kept, logits, base_logits, counts, float(4 if padded else 6) + 9)


CASES = {
    f"{scores}-{'padded' if padded else 'full'}": make_case(scores, padded)
    for scores in ("softmax", "sigmoid")
    for padded in (False, True)
}


def reference(name: str, case: Case, logits: Tensor) -> float:
    """The loss by loops over Python's floats, from its formula alone."""
    rows = logits.tolist()
    kept = range(len(rows)) if case.kept is None else [t for t, counts in enumerate(case.kept.tolist()) if counts]
    total = 0.0
    for t in kept:
        p, b = distribution(case.scores, rows[t]), distribution(case.scores, case.base_logits[t].tolist())
        if name == "load_balancing":
            loads = [count / case.num_tokens for count in case.tokens_per_expert.tolist()]
            total += len(p) * math.fsum(f * p_e for f, p_e in zip(loads, p))
        elif name == "z_loss":
            total += math.log(math.fsum(math.exp(x) for x in rows[t])) ** 2
        else:
            total += math.fsum(b_e * math.log(b_e / p_e) for b_e, p_e in zip(b, p))
    return total / case.num_tokens


def distribution(scores: str, row: list[float]) -> list[float]:
    values = [math.exp(x) if scores == "softmax" else 1 / (1 + math.exp(-x)) for x in row]
    return [value / math.fsum(values) for value in values]


def reference_gradient(name: str, case: Case, step: float = 1e-5) -> Tensor:
    """Central differences of the reference."""
    gradient = torch.zeros_like(case.logits)
    for position in range(case.logits.numel()):
        nudge = torch.zeros_like(case.logits)
        nudge.view(-1)[position] = step
        up, down = (reference(name, case, case.logits + sign * nudge) for sign in (1, -1))
        gradient.view(-1)[position] = (up - down) / (2 * step)
    return gradient


def check(name: str, function: Callable[[LossInput], Tensor], case: Case, dtype: torch.dtype) -> None:
    """Fail unless value and gradient are those of the reference."""
    # Differences of a function computed to 1e-16 in steps of 1e-5 are good to some 1e-10.
    value_error, gradient_error = {torch.float64: (1e-13, 1e-8), torch.float32: (1e-6, 1e-5)}[dtype]
    logits = case.logits.to(dtype, copy=True).requires_grad_()
    share = function(case.input(logits))
    [gradient] = torch.autograd.grad(share, logits)
    assert share.dtype == dtype
    assert share.shape == ()
    assert relative_error(share, torch.tensor(reference(name, case, case.logits), dtype=torch.float64)) <= value_error
    assert relative_error(gradient, reference_gradient(name, case)) <= gradient_error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_formula(name: str, case: Case, dtype: torch.dtype) -> None:
    check(name, LOSSES[name], case, dtype)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str, case: Case) -> None:
    logits = case.logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](case.input(x)), logits)


def counts_with_a_gradient(routed: LossInput) -> Tensor:
    """The same value, with counts that pretend to follow the probabilities."""
    soft = routed.mean_over_tokens(routed.probabilities)
    counts = routed.tokens_per_expert / routed.num_tokens + soft - soft.detach()
    return routed.probabilities.shape[-1] * (counts * soft).sum()


def kl_reversed(routed: LossInput) -> Tensor:
    assert routed.base_probabilities is not None
    return routed.mean_over_tokens(kl_divergence(routed.probabilities, routed.base_probabilities))


def of_this_micro_batch(function: Callable[[LossInput], Tensor]) -> Callable[[LossInput], Tensor]:
    return lambda routed: function(replace(routed, num_tokens=float(routed.logits.shape[0])))


def without_mask(function: Callable[[LossInput], Tensor]) -> Callable[[LossInput], Tensor]:
    return lambda routed: function(replace(routed, kept=None))


MUTATIONS: dict[str, tuple[str, Callable[[LossInput], Tensor]]] = {
    "counts with a gradient": ("load_balancing", counts_with_a_gradient),
    "top_k forgotten": ("load_balancing", lambda routed: load_balancing(routed) / routed.top_k),
    "softmax whatever the scores": (
        "load_balancing",
        lambda routed: load_balancing(replace(routed, probabilities=routed.logits.softmax(-1))),
    ),
    "balance without mask": ("load_balancing", without_mask(load_balancing)),
    "balance of the micro-batch": ("load_balancing", of_this_micro_batch(load_balancing)),
    "z not squared": ("z_loss", lambda routed: routed.mean_over_tokens(routed.logits.logsumexp(-1))),
    "z without mask": ("z_loss", without_mask(z_loss)),
    "z of the micro-batch": ("z_loss", of_this_micro_batch(z_loss)),
    "KL reversed": ("drift_kl", kl_reversed),
    "KL without mask": ("drift_kl", without_mask(drift_kl)),
    "KL of the micro-batch": ("drift_kl", of_this_micro_batch(drift_kl)),
}


@pytest.mark.parametrize(("name", "mutation"), MUTATIONS.values(), ids=MUTATIONS)
def test_the_check_notices(name: str, mutation: Callable[[LossInput], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check(name, mutation, CASES["sigmoid-padded"], torch.float32)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    case = CASES["softmax-padded"]
    rounded = case.logits.bfloat16()
    share = LOSSES[name](case.input(rounded.clone().requires_grad_()))
    assert share.dtype == torch.float32
    # A sum in bfloat16 would be off by 4e-3.
    assert relative_error(share, torch.tensor(reference(name, case, rounded.double()), dtype=torch.float64)) <= 1e-6


def leaves(routing: Any) -> tuple[Tensor, Tensor]:
    """Logits and probabilities that do not hang together, with NaN on padding."""
    padding = torch.zeros(len(routing.logits), dtype=torch.bool) if routing.kept is None else ~routing.kept
    logits, probabilities = routing.logits.clone(), routing.probabilities.clone()
    logits[padding], probabilities[padding] = math.nan, math.nan
    return logits.requires_grad_(), probabilities.requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
@given(split=split_routings())
def test_shares_of_micro_batches_and_processes_sum_to_the_loss_of_the_joined_batch(name: str, split: Any) -> None:
    whole, parts = split
    num_tokens = float(whole.kept.sum())
    experts, top_k = whole.logits.shape[1], whole.top_k_index.shape[1]
    counts = torch.stack([count_choices(part.top_k_index, experts, part.kept) for part in parts]).sum(0)
    assert counts.sum() == top_k * num_tokens

    def share_and_gradients(routing: Any) -> tuple[Tensor, list[Tensor]]:
        logits, probabilities = leaves(routing)
        base = routing.probabilities.flip(1)
        share = LOSSES[name](LossInput(logits, probabilities, routing.kept, counts, num_tokens, top_k, base))
        share.backward()
        return share.detach(), [leaf.grad for leaf in (logits, probabilities) if leaf.grad is not None]

    joined, gradients = share_and_gradients(whole)
    shares, gradients_of_parts = zip(*(share_and_gradients(part) for part in parts))
    assert joined.isfinite()
    torch.testing.assert_close(torch.stack(shares).sum(), joined, rtol=1e-12, atol=1e-12)
    assert gradients
    rows = torch.cat([part.rows for part in parts])
    for gradient, pieces in zip(gradients, zip(*gradients_of_parts)):
        torch.testing.assert_close(torch.cat(pieces), gradient[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_padding_has_no_part_whatever_it_holds(name: str, garbage: float) -> None:
    case = CASES["softmax-padded"]
    assert case.kept is not None
    clean = case.input(case.logits)
    leaf_values = (clean.logits.clone(), clean.probabilities.clone(), clean.base_probabilities.clone())  # type: ignore[union-attr]
    for values in leaf_values:
        values[~case.kept] = garbage
    logits, probabilities, base = leaf_values[0].requires_grad_(), leaf_values[1].requires_grad_(), leaf_values[2]
    share = LOSSES[name](replace(clean, logits=logits, probabilities=probabilities, base_probabilities=base))
    share.backward()

    short = [values[case.kept].detach().requires_grad_() for values in (clean.logits, clean.probabilities)]
    expected = LOSSES[name](
        replace(
            clean,
            logits=short[0],
            probabilities=short[1],
            kept=None,
            base_probabilities=clean.base_probabilities[case.kept],
        )
    )  # type: ignore[index]
    expected.backward()
    torch.testing.assert_close(share, expected, rtol=1e-14, atol=0)
    for leaf, other in ((logits, short[0]), (probabilities, short[1])):
        assert (leaf.grad is None) == (other.grad is None)
        if leaf.grad is not None:
            assert torch.equal(leaf.grad[case.kept], other.grad)
            assert (leaf.grad[~case.kept] == 0).all()


@pytest.mark.parametrize("num_tokens", [0.0, 9.0], ids=["step without tokens", "micro-batch without tokens"])
@pytest.mark.parametrize("tokens", [0, 3], ids=["no rows", "padding only"])
@pytest.mark.parametrize("name", LOSSES)
def test_without_a_token_the_share_is_zero_and_has_a_graph(name: str, tokens: int, num_tokens: float) -> None:
    logits = torch.full((tokens, 4), math.inf, requires_grad=True)
    probabilities = torch.full((tokens, 4), math.nan, requires_grad=True)
    kept = torch.zeros(tokens, dtype=torch.bool)
    counts = torch.arange(4.0) if num_tokens else torch.zeros(4)
    share = LOSSES[name](
        LossInput(logits, probabilities, kept, counts, num_tokens, 2, torch.full((tokens, 4), math.nan))
    )
    assert share.item() == 0.0
    gradients = torch.autograd.grad(share, [logits, probabilities], allow_unused=True, materialize_grads=True)
    assert all((gradient == 0).all() for gradient in gradients)


def routed_by(logits: Tensor, top_k: int, kept: Tensor | None = None) -> LossInput:
    """A step of one micro-batch with softmax scores."""
    counts = count_choices(logits.topk(top_k, -1).indices, logits.shape[1], kept)
    num_tokens = float(logits.shape[0] if kept is None else kept.sum())
    return LossInput(logits, logits.softmax(-1), kept, counts, num_tokens, top_k)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_balanced_routing_has_the_value_top_k_and_a_collapsed_one_more(top_k: int) -> None:
    preferences = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0, -1.0])
    balanced = torch.stack([preferences.roll(shift) for shift in range(6)])
    torch.testing.assert_close(load_balancing(routed_by(balanced, top_k)), torch.tensor(float(top_k)))
    collapsed = preferences.expand(6, 6)
    assert load_balancing(routed_by(collapsed, top_k)) > 1.5 * top_k


@pytest.mark.parametrize("padded", [False, True])
def test_one_layer_with_softmax_has_the_value_and_the_gradient_of_transformers(padded: bool) -> None:
    mask = torch.ones(3, 7, dtype=torch.int64)
    if padded:
        mask[0, 4:], mask[2, :2] = 0, 0
    logits = (2 * torch.randn(21, 8)).requires_grad_()
    ours = load_balancing(routed_by(logits, 2, mask.view(-1).bool() if padded else None))
    theirs = load_balancing_loss_func((logits,), num_experts=8, top_k=2, attention_mask=mask if padded else None)
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


def test_kl_is_exactly_zero_between_equal_routings() -> None:
    probabilities = torch.randn(64, 128).mul(20).softmax(-1)
    assert (probabilities == 0).any()
    assert (kl_divergence(probabilities, probabilities.clone()) == 0).all()


def test_kl_is_finite_where_a_probability_is_zero() -> None:
    base = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    now = torch.tensor([[0.0, 1.0, 0.0], [0.25, 0.5, 0.25], [0.0, 0.0, 1.0]], requires_grad=True)
    kl = kl_divergence(base, now)
    smallest = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(kl.detach(), torch.tensor([-math.log(smallest), 0.5 * math.log(2), 0.0]))
    kl.sum().backward()
    assert now.grad is not None
    assert now.grad.isfinite().all()


def test_the_gradient_of_kl_reaches_the_logits_of_a_nearly_certain_router() -> None:
    """At 80 nats the slope in the probability is 1e35; in the logits it is the difference of the probabilities."""
    logits = torch.tensor([[80.0, 0.0, -1.0]], requires_grad=True)
    base = torch.tensor([[0.2, 0.7, 0.1]])
    kl_divergence(base, logits.softmax(-1)).sum().backward()
    torch.testing.assert_close(logits.grad, logits.softmax(-1).detach() - base)


def test_the_base_model_gets_no_gradient() -> None:
    case = CASES["softmax-full"]
    base = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    share = drift_kl(replace(case.input(case.logits.clone().requires_grad_()), base_probabilities=base))
    assert torch.autograd.grad(share, base, allow_unused=True) == (None,)


def test_the_builtin_records_say_what_they_read() -> None:
    records = PluginHost().records("register_router_losses")
    assert {name: record.function for name, record in records.items() if name in LOSSES} == LOSSES
    routed = CASES["softmax-padded"].input(CASES["softmax-padded"].logits)
    for record in (records[name] for name in LOSSES):
        share = record.function(routed)
        other_counts = record.function(replace(routed, tokens_per_expert=routed.tokens_per_expert.flip(0)))
        assert record.needs_counts == bool(other_counts != share), record.name
        other_base = record.function(replace(routed, base_probabilities=routed.probabilities.flip(1)))
        assert record.needs_base == bool(other_base != share), record.name


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_never_waits_for_the_device(name: str) -> None:
    """Reading a value of a meta tensor is an error, as there is none."""
    logits, kept = torch.empty(6, 4, device="meta"), torch.empty(6, device="meta", dtype=torch.bool)
    counts = torch.empty(4, device="meta", dtype=torch.int64)
    share = LOSSES[name](LossInput(logits, logits.softmax(-1), kept, counts, 6.0, 2, logits.softmax(-1)))
    assert share.device.type == "meta"
