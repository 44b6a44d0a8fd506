"""Each kernel equals the float64 reference: output and every gradient, in every layout and dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.cases import interleaved, make_case, relu_squared
from tests.tolerances import assert_gradient_close, assert_output_close, relative_error
from trl_moe_ext.kernels import grouped, grouped_update
from trl_moe_ext.kernels.experts_mlp import experts_mlp
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.reference import experts_mlp_reference

LAYOUTS = {
    "gated": {},
    "transposed": {"transposed": True},
    "biased": {"bias": True},
    "gpt-oss-like": {"transposed": True, "bias": True, "activation": interleaved},
    "no-gate": {"activation": relu_squared},
    "post-norm": {"post_norm": lambda y: F.rms_norm(y, y.shape[-1:])},
    "no-adapter": {"adapters": 0},
    "two-adapters": {"adapters": 2},
    "dropout": {"dropout": 0.25},
    "two-adapters-dropout": {"adapters": 2, "dropout": 0.25},
    "one-expert": {"E": 1, "K": 1},
    "top-1": {"K": 1},
    "every-expert": {"K": 5},
    "one-token": {"T": 1},
    "idle-experts": {"T": 3, "E": 40},
    "many-rows": {"T": 300, "E": 3},
    "many-experts": {"T": 300, "E": 48},
    "sentinels": {"sentinels": True, "bias": True},
    "rank-1": {"r": 1},
    "gate-apart": {"gate_apart": True},
    "gate-apart-dropout": {"gate_apart": True, "dropout": 0.25},
    "weights-on-input": {"weights_on_input": True, "transposed": True},
    "identity-experts": {"identity_experts": 3, "K": 4},
}

both = pytest.mark.parametrize("kernel", [experts_mlp, fused_experts_mlp], ids=lambda kernel: kernel.__name__)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equals_the_float64_reference(layout, dtype, kernel):
    case = make_case(dtype=dtype, **layout)
    out, gradients = case.run(kernel)
    expected, expected_gradients = case.double().run(experts_mlp_reference)
    assert out.dtype == dtype
    assert_output_close(out, expected, dtype)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_gradient_close(gradient, expected_gradients[name], dtype, name)


def test_float32_factors_on_bfloat16_experts_get_float32_gradients():
    case = make_case(dtype=torch.bfloat16)
    case.up = tuple(u._replace(A=u.A.float(), B=u.B.float()) for u in case.up)
    _, gradients = case.run(experts_mlp)
    _, expected = case.double().run(experts_mlp_reference)
    assert gradients["up[0].A"].dtype == gradients["up[0].B"].dtype == torch.float32
    assert_gradient_close(gradients["up[0].A"], expected["up[0].A"], torch.bfloat16, "A")


def test_routing_weights_keep_their_dtype():
    case = make_case(dtype=torch.bfloat16)
    case.top_k_weights = case.top_k_weights.float()
    out, gradients = case.run(experts_mlp)
    assert out.dtype == torch.bfloat16
    assert gradients["top_k_weights"].dtype == torch.float32


@pytest.mark.parametrize("mutation", ["drop the low-rank term", "swap two experts", "transpose B"])
def test_a_wrong_kernel_would_be_noticed(mutation):
    """The tolerance is tighter than the smallest mistake: this is the test of the tests above."""
    case = make_case(r=12, H=24, I=12)
    wrong = make_case(r=12, H=24, I=12)
    if mutation == "drop the low-rank term":
        wrong.up = ()
    elif mutation == "swap two experts":
        wrong.up = tuple(u._replace(A=u.A[[1, 0, 2, 3, 4]]) for u in wrong.up)
    else:
        wrong.up = tuple(u._replace(B=u.B.reshape(5, 12, 24).mT.contiguous()) for u in wrong.up)
    error = relative_error(wrong.run(experts_mlp)[0], case.run(experts_mlp)[0])
    assert error > 0.02  # above the tolerance of every dtype


def test_weights_that_are_trained_get_their_gradient():
    """A weight's gradient must never be silently zero."""
    case = make_case(dtype=torch.float64)
    up = case.weights.up.detach().clone().requires_grad_()
    reference = up.detach().clone().requires_grad_()
    for weight, kernel in ((up, experts_mlp), (reference, experts_mlp_reference)):
        weights = case.weights._replace(up=weight)
        kernel(case.hidden_states, case.top_k_index, case.top_k_weights, weights, case.up, case.down).sum().backward()
    assert_gradient_close(up.grad, reference.grad, torch.float64, "up")


@both
def test_no_tensor_as_large_as_a_stack_of_experts_is_made(kernel):
    """With few tokens every tensor of forward and backward is smaller than the expert weights."""
    case = make_case(T=4, E=64, H=32, I=24, r=2)
    largest = _largest_allocation(lambda: case.run(kernel))
    assert largest < case.weights.down.numel()


def _largest_allocation(run) -> int:
    """Elements of the largest tensor that an operator returns in storage of its own, views of its inputs left out."""

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            inputs = {
                t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
            }
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                    Watch.largest = max(Watch.largest, tensor.numel())
            return out

    with Watch():
        run()
    return Watch.largest


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_a_graph_break(dtype, kernel):
    case = make_case(dtype=dtype, dropout=0.25)
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    out, gradients = case.run(compiled)
    expected, expected_gradients = case.run(kernel)
    assert_output_close(out, expected, dtype)
    for name, gradient in gradients.items():
        assert_gradient_close(gradient, expected_gradients[name], dtype, name)


@both
def test_autocast_leaves_the_experts_in_the_dtype_of_their_weights(kernel):
    case = make_case(dtype=torch.float32)
    expected, expected_gradients = case.run(kernel)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradients = case.run(kernel)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=0)


@pytest.fixture
def native_products(monkeypatch):
    """The branch that a GPU takes: torch's own grouped product, which exists on the CPU too, and padded ranks."""
    monkeypatch.setattr(grouped, "_native", lambda x, other: True)
    monkeypatch.setattr(grouped_update, "aligned_rank", lambda rank, like: -(-rank // 8) * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_native_products_equal_the_reference_as_well(layout, dtype, native_products):
    # grouped_mm asks for strides of 16 bytes: sizes are multiples of 8, the rank is what gets padded.
    case = make_case(dtype=dtype, H=16, **({"I": 24} | layout))
    out, gradients = case.run(experts_mlp)
    expected, expected_gradients = case.double().run(experts_mlp_reference)
    assert_output_close(out, expected, dtype)
    for name, gradient in gradients.items():
        assert_gradient_close(gradient, expected_gradients[name], dtype, name)


def test_the_native_products_leave_rows_of_no_expert_at_zero(native_products):
    x = torch.randn(8, 16)
    out = grouped.grouped_mm(x, torch.randn(2, 16, 8), torch.tensor([2, 5], dtype=torch.int32))
    assert (out[5:] == 0).all()
