"""What the fused function takes, what it leaves to the two functions, and its gates."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import Chosen, make_case
from tests.tolerances import assert_gradient_close
from trl_moe_ext.kernels import fused, fused_loop
from trl_moe_ext.kernels.dispatch import sort_by_expert
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.fused_parts import Frozen
from trl_moe_ext.kernels.gates import GATES, Gate


@pytest.mark.parametrize("name", GATES)
def test_the_derivative_of_a_gate_is_that_of_autograd(name):
    gate = Gate(name, 1.7, 1.0)
    h = (torch.randn(40, 12, dtype=torch.float64) * 2).requires_grad_()
    out = gate.forward(h)
    grad = torch.randn_like(out)
    [expected] = torch.autograd.grad(out, h, grad)
    assert_gradient_close(gate.backward(h.detach(), grad), expected, torch.float64, name)


SOME, OTHERS = Chosen((0, 3)), Chosen((1,), r=2)
TAKEN = {
    "gated": {},
    "biased": {"bias": True},
    "dropout": {"dropout": 0.25},
    "no adapter": {"adapters": 0},
    "weights on the input": {"weights_on_input": True},
    "some experts": {"selected": (SOME,)},
    "classes of experts": {"selected": (SOME, OTHERS), "dropout": 0.25},
    "up of some, down of all": {"selected": {"up": (SOME, OTHERS), "down": None}},
    "adapters apart": {"selected": (SOME, OTHERS._replace(adapter=1))},
}
LEFT = {
    "two adapters": {"adapters": 2},
    "adapters that overlap": {"selected": {"up": (SOME,), "down": (SOME, Chosen((3,)))}},
    "one of all": {"selected": (SOME, Chosen(None))},
    "adapters that drop other inputs": {"selected": (SOME, OTHERS._replace(adapter=1)), "dropout": 0.25},
    "norm": {"post_norm": lambda y: F.rms_norm(y, y.shape[-1:])},
    "gate apart": {"gate_apart": True},
}


@pytest.mark.parametrize(("layout", "is_taken"), [*((k, True) for k in TAKEN), *((k, False) for k in LEFT)])
def test_what_is_taken(layout, is_taken, monkeypatch):
    calls = []
    monkeypatch.setattr(fused, "experts_mlp", lambda *args, **kwargs: calls.append("two functions"))
    case = make_case(**(TAKEN | LEFT)[layout])
    fused_experts_mlp(case.hidden_states, case.top_k_index, case.top_k_weights, case.weights, case.up, case.down)
    assert calls == ([] if is_taken else ["two functions"])


def test_weights_that_are_trained_are_left_to_the_two_functions():
    """A weight's gradient must never be silently zero."""
    case = make_case()
    weights = case.weights._replace(up=case.weights.up.detach().requires_grad_())
    out = fused_experts_mlp(case.hidden_states, case.top_k_index, case.top_k_weights, weights, case.up, case.down)
    out.sum().backward()
    assert weights.up.grad is not None


def test_what_was_not_kept_is_computed_again():
    """The same bits, from the output of the first projection or without it."""
    case = make_case(dtype=torch.bfloat16, bias=True)
    dispatch, factors = sort_by_expert(case.top_k_index, 5), (case.up, case.down)
    weights = case.weights
    frozen = Frozen(weights.up, weights.down, weights.up_bias, weights.down_bias, weights.closed_form)
    outputs, gradients = [], []
    for keep in (True, False):
        tokens = case.hidden_states, case.top_k_weights
        out, kept = fused_loop.forward(*tokens, frozen, factors, dispatch, keep)
        assert bool(kept.h.numel()) is keep
        outputs.append(out)
        hidden, routed, *both = fused_loop.backward(case.grad, *tokens, kept, frozen, factors, dispatch, True)
        gradients.append([hidden, routed, *(gradient for [pair] in both for gradient in pair)])
    assert torch.equal(*outputs)
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


FIRST_PROJECTIONS = {
    "gate_up": ("gate_up", None, 1),
    "none": ("none", None, 2),
    # A checkpoint runs the forward twice. To compute the first projection in the backward pass too would be a third.
    "gate_up under a checkpoint": ("gate_up", False, 2),
    "none under a checkpoint": ("none", False, 2),
    "none under a reentrant checkpoint": ("none", True, 2),
}


@pytest.mark.parametrize(
    ("save_activations", "use_reentrant", "times"), FIRST_PROJECTIONS.values(), ids=FIRST_PROJECTIONS
)
def test_how_often_the_first_projection_is_computed(save_activations, use_reentrant, times, monkeypatch):
    calls = []
    original = fused_loop._first_projection
    monkeypatch.setattr(fused_loop, "_first_projection", lambda *args: calls.append(args[-1].rows) or original(*args))
    kernel = partial(fused_experts_mlp, save_activations=save_activations)
    if use_reentrant is not None:
        kernel = partial(checkpoint, kernel, use_reentrant=use_reentrant)
    run_backward(make_case(), kernel)
    assert len(calls) == times * len(set(map(str, calls)))


def run_backward(case, kernel):
    """As a trainer does: a reentrant checkpoint takes no `torch.autograd.grad`."""
    hidden = case.hidden_states.requires_grad_()
    kernel(hidden, case.top_k_index, case.top_k_weights, case.weights, case.up, case.down).sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("layout", [*TAKEN.values(), *LEFT.values()], ids=[*TAKEN, *LEFT])
def test_what_is_saved_changes_no_number(layout):
    case = make_case(**layout)
    (out, gradients), (lean_out, lean_gradients) = (
        case.run(partial(fused_experts_mlp, save_activations=words)) for words in ("gate_up", "none")
    )
    assert torch.equal(out, lean_out)
    assert all(torch.equal(gradient, lean_gradients[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("layout", [{}, LEFT["norm"]], ids=["fused", "two functions"])
def test_none_saves_nothing_as_wide_as_the_first_projection(layout):
    case = make_case(T=64, H=4, I=32, **layout)

    def wide_rows(save_activations):
        shapes = [shape for shape, _ in saved_by(case, save_activations) if len(shape) == 2]
        return sum(shape.numel() for shape in shapes if shape[1] >= 32)

    assert wide_rows("gate_up") >= 64 * 2 * 64
    assert wide_rows("none") == 0


@pytest.mark.parametrize("selected", [None, (SOME, OTHERS)], ids=["all experts", "some"])
def test_what_is_kept_does_not_depend_on_the_routing(selected):
    """Non-reentrant checkpointing compares the saved tensors of forward and recompute."""
    cases = (make_case(seed=seed, T=9, E=40, dtype=torch.bfloat16, selected=selected) for seed in (0, 1))
    first, second = map(saved_by, cases)
    assert first == second
    assert first


def saved_by(case, save_activations="gate_up"):
    """Shapes and dtypes of the tensors that are kept, those that a checkpoint keeps for itself left out."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.shape, t.dtype)) or t, lambda t: t):
        hidden = case.hidden_states.requires_grad_()
        arguments = hidden, case.top_k_index, case.top_k_weights, case.weights, case.up, case.down
        fused_experts_mlp(*arguments, save_activations=save_activations)
    return saved
