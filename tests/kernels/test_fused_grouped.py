"""The fused expert MLP over grouped products: equal to the float64 reference, traceable, bounded in memory."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.kernels.cases import Chosen, interleaved, make_case, relu_squared, swiglu
from tests.tolerances import assert_gradient_close, assert_output_close
from trl_moe_ext.bench.call import Call
from trl_moe_ext.kernels import fused, fused_grouped, fused_loop, grouped, grouped_update
from trl_moe_ext.kernels.dispatch import sort_by_expert
from trl_moe_ext.kernels.fused_parts import Frozen, Kept
from trl_moe_ext.kernels.reference import experts_mlp_reference

LAYOUTS = {
    "gated": {},
    "transposed": {"transposed": True},
    "biased": {"bias": True},
    "gpt-oss-like": {"transposed": True, "bias": True, "activation": interleaved},
    "no-gate": {"activation": relu_squared},
    "no-adapter": {"adapters": 0},
    "dropout": {"dropout": 0.25, "bias": True},
    "one-expert": {"E": 1, "K": 1},
    "top-1": {"K": 1},
    "every-expert": {"K": 5},
    # With less than four rows one rounding of a rank-sized sum can be the whole error of a bfloat16 gradient.
    "one-token": {"T": 1, "K": 4},
    "idle-experts": {"T": 3, "E": 40},
    "many-rows": {"T": 300, "E": 3},
    "sentinels": {"sentinels": True, "bias": True},
    "rank-1": {"r": 1},
    "weights-on-input": {"weights_on_input": True, "transposed": True},
    "some-experts": {"T": 60, "selected": (Chosen((0, 3)), Chosen((2,), r=9)), "dropout": 0.25, "sentinels": True},
    "weights-on-input-biased-dropout": {"weights_on_input": True, "bias": True, "dropout": 0.25, "sentinels": True},
}


def frozen_of(case: Call) -> Frozen:
    w = case.weights
    return Frozen(w.up, w.down, w.up_bias, w.down_bias, w.closed_form, w.weights_on_input)


def run(case: Call, *, keep=True, needs_hidden=True):
    """Output, what was kept, and every gradient by the name of its leaf."""
    dispatch = sort_by_expert(case.top_k_index, case.weights.up.shape[0])
    tokens, frozen, factors = (case.hidden_states, case.top_k_weights), frozen_of(case), (case.up, case.down)
    out, kept = fused_grouped.forward(*tokens, frozen, factors, dispatch, keep)
    gradients = fused_grouped.backward(case.grad, *tokens, kept, frozen, factors, dispatch, needs_hidden)
    named = {"hidden_states": gradients.hidden, "top_k_weights": gradients.weights}
    for projection, pairs in (("up", gradients.up), ("down", gradients.down)):
        for number, (A, B) in enumerate(pairs):
            named |= {f"{projection}[{number}].A": A, f"{projection}[{number}].B": B}
    return out, kept, named


def assert_equals_reference(case: Call, dtype: torch.dtype) -> None:
    out, _, gradients = run(case)
    expected, expected_gradients = case.double().run(experts_mlp_reference)
    assert out.dtype == dtype
    assert_output_close(out, expected, dtype)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert_gradient_close(gradient, expected_gradients[name], dtype, name)


@pytest.fixture
def native_products(monkeypatch):
    """The branch that a GPU takes, on the CPU: torch's own grouped product and padded ranks.

    Rows of no expert, which a GPU leaves uninitialised, come out as NaN.
    """
    product = torch.nn.functional.grouped_mm

    def poisoned(x, weight, *, offs):
        out = product(x, weight, offs=offs)
        if weight.dim() == 3:
            out = out.masked_fill((torch.arange(out.shape[0]) >= offs[-1]).unsqueeze(1), float("nan"))
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
    monkeypatch.setattr(grouped, "_native", lambda x, other: True)
    monkeypatch.setattr(grouped_update, "aligned_rank", lambda rank, like: -(-rank // 8) * 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_equals_the_float64_reference(layout, dtype):
    assert_equals_reference(make_case(dtype=dtype, **layout), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_native_products_equal_the_reference_as_well(layout, dtype, native_products):
    # grouped_mm asks for strides of 16 bytes: sizes are multiples of 8, the rank is what gets padded.
    assert_equals_reference(make_case(dtype=dtype, **({"I": 24} | layout)), dtype)


@pytest.mark.parametrize("layout", ["biased", "dropout", "weights-on-input", "no-adapter"])
def test_what_was_not_kept_is_computed_again(layout):
    """The same bits, from the output of the first projection or without it."""
    case = make_case(dtype=torch.bfloat16, **LAYOUTS[layout])
    (out, kept, gradients), (again, nothing, recomputed) = run(case), run(case, keep=False)
    assert kept.h.shape == (46, 24)
    assert nothing.h.numel() == 0
    assert torch.equal(out, again)
    assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


def test_what_was_kept_is_left_as_it_is():
    """Backward may run twice, with `retain_graph`."""
    case = make_case(dtype=torch.bfloat16, bias=True, dropout=0.25)
    dispatch = sort_by_expert(case.top_k_index, 5)
    rest = frozen_of(case), (case.up, case.down), dispatch
    _, kept = fused_grouped.forward(case.hidden_states, case.top_k_weights, *rest, True)
    before = [tensor.clone() for tensor in kept]
    fused_grouped.backward(case.grad, case.hidden_states, case.top_k_weights, kept, *rest, True)
    assert all(torch.equal(*pair) for pair in zip(before, kept, strict=True))


def test_what_is_kept_depends_on_the_number_of_rows_alone():
    """Non-reentrant checkpointing compares the saved tensors of forward and recompute."""
    shapes = [[tensor.shape for tensor in run(make_case(T=9, E=40, seed=seed))[1]] for seed in (0, 1)]
    assert shapes[0] == shapes[1] == list(Kept((18, 24), (18, 3), (18, 3)))


def test_tokens_of_no_expert_receive_zero(native_products):
    case = make_case(sentinels=True, bias=True, I=24)
    case.top_k_index[3:7] = torch.tensor([5, 6])
    out, _, gradients = run(case)
    assert (out[3:7] == 0).all()
    assert (gradients["hidden_states"][3:7] == 0).all()
    assert (gradients["top_k_weights"][3:7] == 0).all()
    assert all(gradient.isfinite().all() for gradient in (out, *gradients.values()))


def test_no_rows_at_all_give_zero(native_products):
    """Expert parallelism may leave a rank without a single row."""
    case = make_case(sentinels=True, bias=True, I=24, dropout=0.25)
    case.top_k_index[:] = torch.tensor([5, 6])
    out, _, gradients = run(case)
    assert all((tensor == 0).all() for tensor in (out, *gradients.values()))


def test_gradients_come_in_the_dtypes_of_what_they_belong_to():
    case = make_case(dtype=torch.bfloat16)
    case.up = tuple(u._replace(A=u.A.float(), B=u.B.float()) for u in case.up)
    case.top_k_weights = case.top_k_weights.float()
    out, _, gradients = run(case)
    dtypes = {name: gradient.dtype for name, gradient in gradients.items()}
    single, half = torch.float32, torch.bfloat16
    assert out.dtype == half
    assert dtypes == {
        "hidden_states": half,
        "top_k_weights": single,
        "up[0].A": single,
        "up[0].B": single,
        "down[0].A": half,
        "down[0].B": half,
    }
    _, expected = case.double().run(experts_mlp_reference)
    for name, gradient in gradients.items():
        assert_gradient_close(gradient, expected[name], half, name)


@pytest.mark.parametrize("layout", ["gated", "weights-on-input", "no-adapter"])
def test_a_gradient_of_tokens_that_nobody_needs_is_left_out(layout):
    case = make_case(**LAYOUTS[layout])
    _, _, needed = run(case)
    _, _, left_out = run(case, needs_hidden=False)
    assert left_out.pop("hidden_states") is None
    assert all(torch.equal(needed[name], gradient) for name, gradient in left_out.items())


@pytest.mark.parametrize(
    ("options", "products"),
    [({}, 4), ({"keep": False}, 5), ({"needs_hidden": False}, 3)],
    ids=["all", "first projection again", "no gradient of tokens"],
)
def test_the_frozen_weights_are_multiplied_no_oftener_than_needed(options, products, monkeypatch):
    widths = []
    product = fused_grouped.grouped_mm

    def counted(x, weight, offsets, **how):
        widths.append(weight.shape[1:])
        return product(x, weight, offsets, **how)

    monkeypatch.setattr(fused_grouped, "grouped_mm", counted)
    run(make_case(r=3, H=16, I=12), **options)
    assert sum(3 not in width for width in widths) == products


TRACED = [
    "some-experts",
    "gated",
    "gpt-oss-like",
    "no-gate",
    "dropout",
    "no-adapter",
    "sentinels",
    "weights-on-input-biased-dropout",
]


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize("layout", TRACED)
def test_no_number_is_read_from_the_device(layout, keep, native_products):
    """Fake tensors have no numbers: reading one, which would wait for a GPU, raises."""
    case = make_case(dtype=torch.bfloat16, I=24, **LAYOUTS[layout])
    expected, (out, kept, gradients) = run(case, keep=keep), _on_fake_tensors(lambda c: run(c, keep=keep), case)
    assert out.shape == expected[0].shape
    assert [tensor.shape for tensor in kept] == [tensor.shape for tensor in expected[1]]
    assert {n: (g.shape, g.dtype) for n, g in gradients.items()} == {
        n: (g.shape, g.dtype) for n, g in expected[2].items()
    }


def test_a_number_that_is_read_would_be_noticed():
    """The test of the test above: the back end of the CPU reads how many rows each expert has."""

    def forward(case):
        dispatch = sort_by_expert(case.top_k_index, 5)
        tokens = case.hidden_states, case.top_k_weights
        return fused_loop.forward(*tokens, frozen_of(case), (case.up, case.down), dispatch, True)

    with pytest.raises(DataDependentOutputException):
        _on_fake_tensors(forward, make_case())


@pytest.mark.parametrize("layout", TRACED)
def test_no_operator_adds_in_an_order_of_its_own(layout, native_products):
    """Sums by atomic operations differ from run to run: the sums over K must not be made of them."""
    leaves, rebuilt = _flat(make_case(dtype=torch.bfloat16, I=24, **LAYOUTS[layout]))
    graph = make_fx(lambda *tensors: run(rebuilt(tensors)), tracing_mode="fake")(*leaves).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("_grouped_mm" in name for name in names) >= 4
    # The one index_put writes the inverse permutation, and no place twice.
    unordered = [name for name in names if any(word in name for word in ("index_add", "scatter", "index_put"))]
    assert unordered == ["aten.index_put_.default"]


@pytest.mark.parametrize("weights_on_input", [False, True], ids=["weights on output", "weights on input"])
@pytest.mark.parametrize("activation", [swiglu, interleaved, relu_squared], ids=lambda activation: activation.__name__)
def test_compiles_without_a_graph_break(activation, weights_on_input):
    case = make_case(activation=activation, weights_on_input=weights_on_input, bias=True, dropout=0.25, sentinels=True)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, _, gradients = compiled(case)
    expected, _, expected_gradients = run(case)
    assert_output_close(out, expected, torch.float32)
    for name, gradient in gradients.items():
        assert_gradient_close(gradient, expected_gradients[name], torch.float32, name)


def test_what_is_not_needed_any_more_is_freed():
    """The most that is alive at once: in the gate's backward, h, the activation, their gradients and two more."""
    case = make_case(T=256, K=8, E=8, H=96, I=32, r=1, dtype=torch.bfloat16)
    with _Alive() as alive:
        run(case, keep=False)
    assert alive.peak < 9 * (256 * 8 * 32)


class _Alive(TorchDispatchMode):
    """Follows the number of bfloat16 elements that fit into the storages which operators made and nobody freed."""

    def __init__(self):
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {_storage(t)._cdata for t in _tensors((args, kwargs))}
        for made in (_storage(t) for t in _tensors(out)):
            if made._cdata not in inputs:
                self._storages[made._cdata] = StorageWeakRef(made), made.nbytes() // 2
        self._storages = {key: value for key, value in self._storages.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return out


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _on_fake_tensors(function, case: Call):
    leaves, rebuilt = _flat(case)
    with FakeTensorMode() as mode:
        return function(rebuilt(mode.from_tensor(leaf) for leaf in leaves))


def _flat(case: Call):
    """The tensors of a case, and a function that puts others in their places."""
    fields = tuple(getattr(case, name) for name in case.__dataclass_fields__)
    leaves = _tensors(fields)

    def rebuilt(tensors):
        remaining = iter(tensors)
        return Call(*tree_map_only(torch.Tensor, lambda _: next(remaining), fields))

    return leaves, rebuilt


@pytest.mark.parametrize("at_once", [1, 7, 19])
def test_tokens_in_parts_are_the_same_as_at_once(monkeypatch, at_once):
    """Outputs, masks of dropout and all gradients: a part must not begin the masks anew."""
    monkeypatch.setattr(fused, "_back_end", lambda hidden: fused_grouped)
    case = make_case(dtype=torch.float64, T=19, dropout=0.25)
    whole, gradients = case.run(fused.fused_experts_mlp)
    monkeypatch.setattr(fused, "_PAIRS_AT_ONCE", at_once * case.top_k_index.shape[1])
    out, found = case.run(fused.fused_experts_mlp)
    assert_output_close(out, whole, torch.float64)
    for name, gradient in found.items():
        assert_gradient_close(gradient, gradients[name], torch.float64, name)
    expected, _ = case.run(experts_mlp_reference)
    assert_output_close(out, expected, torch.float64)
