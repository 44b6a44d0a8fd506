"""Experts of which some are trained in full equal the float64 reference: output and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.kernels.cases import interleaved, make_case, relu_squared
from tests.tolerances import assert_gradient_close, assert_output_close, relative_error
from trl_moe_ext.kernels import trained, trained_linear
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.kernels.reference import experts_mlp_reference
from trl_moe_ext.kernels.selected import SelectedExperts
from trl_moe_ext.kernels.trained import ExpertsDeltas, trained_experts_mlp, trained_rows

STACKS = ("up", "down", "gate", "up_bias", "down_bias")
# Which of the five experts are trained, and what is trained of them.
SOME, ONE, ALL = (1, 3), (2,), (0, 1, 2, 3, 4)
LAYOUTS = {
    "gated": {},
    "transposed": {"transposed": True},
    "one expert": {"selected": ONE},
    "all experts": {"selected": ALL, "bias": True},
    "biased": {"bias": True},
    "gpt-oss-like": {"transposed": True, "bias": True, "activation": interleaved},
    "no gate": {"activation": relu_squared},
    "post-norm": {"post_norm": lambda y: F.rms_norm(y, y.shape[-1:])},
    "post-norm that moves zero": {"post_norm": lambda y: y + 1},
    "top 1": {"K": 1},
    "every expert": {"K": 5},
    "one token": {"T": 1, "K": 5, "H": 32, "I": 24},  # 16 numbers may cancel to little but rounding
    "idle experts": {"T": 3, "E": 40, "selected": (0, 7, 39)},
    "many rows": {"T": 300, "E": 6},
    "sentinels": {"sentinels": True, "bias": True},
    "gate apart": {"gate_apart": True},
    "weights on input": {"weights_on_input": True, "transposed": True, "sentinels": True, "bias": True},
    "identity experts": {"identity_experts": 3, "K": 4},
    "identity experts, all trained": {"identity_experts": 3, "K": 4, "selected": ALL},
    "down alone": {"trained": ("down",), "bias": True},
    "up alone": {"trained": ("up", "up_bias"), "bias": True},
    "gate alone": {"trained": ("gate",), "gate_apart": True},
}


class Trained:
    """A case whose selected experts have deltas, and its leaves."""

    def __init__(
        self, *, selected=SOME, trained=STACKS, delta_dtype=None, dtype=torch.float32, device="cpu", **layout
    ):
        self.case = make_case(adapters=0, dtype=dtype, **layout).to(device)
        self.selected = SelectedExperts(selected, layout.get("E", 5))
        g = torch.Generator().manual_seed(9)
        self.deltas: dict[str, Tensor] = {}
        for name in trained:
            stack = getattr(self.case.weights, name)
            if stack is not None:
                delta = torch.randn(len(selected), *stack.shape[1:], generator=g) * 0.3
                # In the order in which the frozen stack stands in memory.
                delta = delta.mT.contiguous().mT if stack.stride(-1) != 1 else delta
                self.deltas[name] = delta.to(device, delta_dtype or dtype)

    def run(self, kernel) -> tuple[Tensor, dict[str, Tensor]]:
        hidden, weights = (
            x.detach().clone().requires_grad_() for x in (self.case.hidden_states, self.case.top_k_weights)
        )
        deltas = {name: delta.detach().clone().requires_grad_() for name, delta in self.deltas.items()}
        out = kernel(hidden, self.case.top_k_index, weights, self.case.weights, ExpertsDeltas(self.selected, **deltas))
        leaves = {"hidden_states": hidden, "top_k_weights": weights, **deltas}
        gradients = torch.autograd.grad(out, list(leaves.values()), self.case.grad.to(out.dtype))
        return out, dict(zip(leaves, gradients, strict=True))

    def double(self) -> Trained:
        twin = object.__new__(Trained)
        twin.case, twin.selected = self.case.to("cpu").double(), self.selected
        twin.deltas = {name: delta.cpu().double() for name, delta in self.deltas.items()}
        return twin


def merged(weights: ExpertsWeights, deltas: ExpertsDeltas) -> ExpertsWeights:
    """The stacks with the deltas in them, by ordinary autograd."""
    experts = torch.tensor(deltas.selected.experts)
    sums = {
        name: getattr(weights, name).index_add(0, experts, getattr(deltas, name))
        for name in STACKS
        if getattr(deltas, name) is not None
    }
    return weights._replace(**sums)


def reference(hidden, index, top_k_weights, weights, deltas):
    return experts_mlp_reference(hidden, index, top_k_weights, merged(weights, deltas), (), ())


@pytest.fixture(params=["counted", "at once", "in parts"])
def rows(request, monkeypatch):
    """On a CPU only rows of selected experts; and the form of GPUs and compilers, in which shapes follow T and K."""
    if request.param != "counted":
        do_not_count(monkeypatch)
    if request.param == "in parts":
        monkeypatch.setattr(trained, "_PAIRS_AT_ONCE", 7)  # a few tokens, and not as many in the last part


def do_not_count(monkeypatch) -> None:
    for module in (trained, trained_linear):
        monkeypatch.setattr(module, "rows_are_counted", lambda index: False)


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_float64_reference(layout, dtype):
    check_equals_the_reference(Trained(dtype=dtype, **LAYOUTS[layout]), dtype)


def check_equals_the_reference(case: Trained, dtype: torch.dtype) -> None:
    out, gradients = case.run(trained_experts_mlp)
    expected, expected_gradients = case.double().run(reference)
    assert out.dtype == dtype
    assert_output_close(out, expected, dtype)
    for name, gradient in gradients.items():
        if not expected_gradients[name].any():  # a bias under a post-norm that forgets it, or nobody came
            assert not gradient.any(), name
        else:
            assert_gradient_close(gradient, expected_gradients[name], dtype, name)


def test_float32_deltas_on_bfloat16_experts_get_float32_gradients_of_their_own_strides():
    case = Trained(dtype=torch.bfloat16, delta_dtype=torch.float32, bias=True)
    check_equals_the_reference(case, torch.bfloat16)
    _, gradients = case.run(trained_experts_mlp)
    for name, delta in case.deltas.items():
        assert gradients[name].dtype == torch.float32
        assert gradients[name].stride() == delta.stride()


def test_a_delta_is_added_before_it_is_rounded():
    """A step of the optimiser that is smaller than a rounding of the weight adds up in the delta."""
    weight = torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16)
    index, x = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bfloat16)
    rows = trained_linear.rows_of_selected(index, SelectedExperts((0,), 1))
    for delta, expected in ((2.0**-9, 1.0), (2.0**-7, 1 + 2.0**-7)):
        y = trained_linear.trained_linear(x, weight, torch.full((1, 1, 1), delta), rows)
        assert float(y) == expected


@pytest.mark.parametrize("mutation", ["no delta", "another expert", "no bias"])
def test_a_wrong_kernel_would_be_noticed(mutation):
    case, wrong = Trained(bias=True), Trained(bias=True)
    if mutation == "another expert":
        wrong.selected = SelectedExperts((0, 3), 5)
    else:
        wrong.deltas = {n: d * (0 if mutation == "no delta" or "bias" in n else 1) for n, d in wrong.deltas.items()}
    assert relative_error(wrong.run(trained_experts_mlp)[0], case.run(trained_experts_mlp)[0]) > 0.02


@pytest.mark.parametrize("selected", [SOME, ALL], ids=["some", "all"])
def test_rows_that_are_sorted_already(selected):
    counts, generator = [3, 0, 4, 2, 5], torch.Generator().manual_seed(0)
    x, weight, delta = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((sum(counts), 6), (5, 6, 7), (len(selected), 6, 7))
    )
    direction = torch.randn(sum(counts), 7, generator=generator, dtype=torch.float64)
    x.requires_grad_(), delta.requires_grad_()
    found = trained_rows(x, counts, weight, delta, SelectedExperts(selected, 5))
    sums = weight.index_add(0, torch.tensor(selected), delta)
    expected = torch.cat([part @ sums[e] for e, part in enumerate(x.split(counts))])
    assert_output_close(found, expected, torch.float64)
    gradients = (torch.autograd.grad(y, (x, delta), direction) for y in (found, expected))
    for name, ours, theirs in zip(("x", "delta"), *gradients, strict=True):
        assert_gradient_close(ours, theirs, torch.float64, name)


def test_nothing_as_large_as_a_stack_is_made_and_no_merged_weight_is_kept():
    case = Trained(T=4, E=64, H=32, I=24, selected=(3, 40))
    stack = case.case.weights.down.numel()
    kept: list[int] = []

    def run():
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.untyped_storage().data_ptr()) or x, lambda x: x
        ):
            out = trained_experts_mlp(*leaves, case.case.weights, ExpertsDeltas(case.selected, **deltas))
        out.sum().backward()

    leaves = case.case.hidden_states, case.case.top_k_index, case.case.top_k_weights
    deltas = {name: delta.requires_grad_() for name, delta in case.deltas.items()}
    allocated = _allocations(run)
    assert max(allocated.values()) < stack
    merged_size = case.deltas["up"].numel()
    assert not {pointer for pointer, size in allocated.items() if size == merged_size} & {*kept}


def test_a_long_batch_makes_no_tensor_with_more_rows_than_a_part(monkeypatch):
    """Where every pair has a row. What is kept is not bounded, but each of its tensors is."""
    do_not_count(monkeypatch)
    case = Trained(T=120, K=5, H=48, I=8)
    largest = {}
    for at_once in (600, 50):
        monkeypatch.setattr(trained, "_PAIRS_AT_ONCE", at_once)
        largest[at_once] = max(_allocations(lambda: case.run(trained_experts_mlp)).values())
    assert largest == {600: 120 * 5 * 48, 50: 120 * 48}  # a row a pair, and then no more than the tokens themselves


def test_parts_give_what_the_whole_gives(monkeypatch):
    do_not_count(monkeypatch)
    case = Trained(T=50, dtype=torch.float64, bias=True)
    calls = []
    part = trained._part
    monkeypatch.setattr(trained, "_part", lambda *arguments: calls.append(len(arguments[0])) or part(*arguments))
    expected, expected_gradients = case.run(trained_experts_mlp)
    monkeypatch.setattr(trained, "_PAIRS_AT_ONCE", 32)
    out, gradients = case.run(trained_experts_mlp)
    assert calls == [50, 16, 16, 16, 2]
    assert_output_close(out, expected, torch.float64)
    for name, gradient in gradients.items():
        assert gradient.stride() == expected_gradients[name].stride()
        assert_gradient_close(gradient, expected_gradients[name], torch.float64, name)


def _allocations(run) -> dict[int, int]:
    """Where operators put what they return, in storage that is not of their inputs -> its elements."""
    found: dict[int, int] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            inputs = {
                x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)
            }
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in inputs:
                    found[x.untyped_storage().data_ptr()] = x.numel()
            return out

    with Watch():
        run()
    return found


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_parts_under_a_checkpoint(use_reentrant, monkeypatch):
    monkeypatch.setattr(trained, "_PAIRS_AT_ONCE", 7)
    case = Trained(T=20, dtype=torch.float64, bias=True)

    leaves = [x.requires_grad_() for x in (case.case.hidden_states, case.case.top_k_weights, *case.deltas.values())]

    def run(kernel, hidden, weights, *deltas):
        named = dict(zip(case.deltas, deltas, strict=True))
        return kernel(hidden, case.case.top_k_index, weights, case.case.weights, ExpertsDeltas(case.selected, **named))

    # By `backward`: a reentrant checkpoint refuses `autograd.grad`.
    checkpoint(run, trained_experts_mlp, *leaves, use_reentrant=use_reentrant).backward(case.case.grad)
    expected = torch.autograd.grad(run(reference, *leaves), leaves, case.case.grad)
    for name, leaf, gradient in zip(("hidden", "weights", *case.deltas), leaves, expected, strict=True):
        assert_gradient_close(leaf.grad, gradient, torch.float64, name)


@pytest.mark.parametrize("at_once", [65_536, 7], ids=["whole", "in parts"])
def test_compiles_without_a_break(at_once, monkeypatch):
    monkeypatch.setattr(trained, "_PAIRS_AT_ONCE", at_once)
    case = Trained(bias=True)
    compiled = torch.compile(trained_experts_mlp, fullgraph=True, backend="aot_eager")
    out, gradients = case.run(compiled)
    expected, expected_gradients = case.run(trained_experts_mlp)
    assert_output_close(out, expected, torch.float32)
    for name, gradient in gradients.items():
        assert_gradient_close(gradient, expected_gradients[name], torch.float32, name)


GPU_LAYOUTS = {
    "gated": {},
    "transposed": {"transposed": True, "bias": True, "activation": interleaved},
    "no gate": {"activation": relu_squared},
    "sentinels": {"sentinels": True, "bias": True, "T": 70},
    "many rows": {"T": 600},
    "down alone": {"trained": ("down",)},
    "gate apart": {"gate_apart": True},
    "all experts": {"selected": ALL},
    "weights on input": {"weights_on_input": True, "transposed": True, "sentinels": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", GPU_LAYOUTS)
def test_equals_the_reference_on_a_gpu(layout, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    case = Trained(dtype=dtype, delta_dtype=torch.float32, device="cuda", H=64, I=48, **GPU_LAYOUTS[layout])
    out, gradients = case.run(trained_experts_mlp)
    expected, expected_gradients = case.double().run(reference)
    assert_output_close(out.cpu(), expected, dtype)
    for name, gradient in gradients.items():
        assert_gradient_close(gradient.cpu(), expected_gradients[name], dtype, name)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_the_device_is_never_waited_for():
    case = Trained(dtype=torch.bfloat16, device="cuda", H=64, I=48, bias=True, identity_experts=2, K=3)
    case.run(trained_experts_mlp)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(trained_experts_mlp)
    finally:
        torch.cuda.set_sync_debug_mode("default")
