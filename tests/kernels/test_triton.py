"""The Triton kernels in Triton's interpreter, which needs no GPU: each equals the formula in float64.

Torch for CPUs comes without Triton: `pip install triton` to run them. `test_on_a_gpu.py` runs them on a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("there is a GPU, on which test_on_a_gpu.py runs the kernels themselves", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="triton is not installed; torch for CPUs comes without it")

from tests.kernels.cases import Chosen, make_case
from tests.tolerances import assert_gradient_close, assert_output_close
from trl_moe_ext.kernels import fused, fused_grouped, low_rank_rows, on_triton, triton_low_rank, triton_rows
from trl_moe_ext.kernels.dispatch import sort_by_expert
from trl_moe_ext.kernels.gates import GATES, Gate
from trl_moe_ext.kernels.reference import experts_mlp_reference
from trl_moe_ext.kernels.selected import SelectedExperts

T, K, E, N, R = 13, 3, 5, 70, 5


def padded(*shape: int) -> torch.Tensor:
    """Rows that do not lie side by side, as those of torch's grouped product may."""
    return torch.randn(shape[0], shape[1] + 3)[:, : shape[1]]


@pytest.mark.parametrize("name", GATES)
def test_gate_and_its_backward(name):
    gate = Gate(name, 1.7, 1.5)
    h = padded(T * K, 2 * N if name.endswith("_glu") or name == "clamped" else N)
    d_a, w = padded(T * K, N), torch.rand(T * K, 1)
    a = gate.forward(h.double())
    expected = gate.backward(h.double(), (d_a * w).double())
    expected_w = (a * d_a.double()).sum(-1)

    assert_output_close(triton_rows.gated(gate, h), a, torch.float32)
    d_h, a_again, d_w = triton_rows.gated_backward(gate, h, d_a.clone(), w)
    assert_output_close(a_again, a, torch.float32)
    assert_gradient_close(d_h, expected, torch.float32, "h")
    assert_gradient_close(d_w, expected_w, torch.float32, "weights")
    assert triton_rows.gated_backward(gate, h, d_a.clone(), None)[2] is None


@pytest.fixture(autouse=True)
def _nan_where_nothing_was_written():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def dispatch():
    """Some slots belong to no expert, some experts have no row."""
    index = torch.stack([torch.randperm(E + 2)[:K] for _ in range(T)])
    index[index == 2] = E + 3
    return sort_by_expert(index, E)


def updated(rows, u, B, dispatch, experts):
    """In float64: the product of u and the factor of each of these experts, added to its rows."""
    total, start = rows.double(), 0
    for expert, end in enumerate(dispatch.offsets.tolist()):
        if expert in experts:
            total[start:end] += u[start:end].double() @ B[experts.index(expert)].double().T
        start = end
    return total


def test_low_rank_update_is_added_to_the_rows_of_its_expert(dispatch):
    rows, u, B = padded(T * K, N), torch.randn(T * K, R), torch.randn(E, N, R)
    expected = updated(rows, u, B, dispatch, range(E))
    triton_low_rank.add_low_rank(rows, u, B.mT, dispatch.offsets)
    assert_output_close(rows, expected, torch.float32)


class Some:
    """Two of the experts, and the runs that these and the others form."""

    def __init__(self, dispatch):
        self.experts = SelectedExperts((1, 4), E)
        self.runs = self.experts.runs(torch.device("cpu"))
        self.groups = dispatch.offsets[self.runs.last], self.runs.is_alone

    def spread(self, factors):
        """Rows of the others must not be read: NaN shows it."""
        spread = self.runs.spread(factors)
        spread[~self.runs.is_alone] = float("nan")
        return spread

    def is_idle(self, dispatch):
        expert = torch.searchsorted(dispatch.offsets, torch.arange(T * K, dtype=torch.int32), right=True)
        return (expert < E) & (expert != 1) & (expert != 4)


@pytest.fixture
def some(dispatch):
    return Some(dispatch)


def test_low_rank_update_of_some_experts_is_added_to_their_rows(dispatch, some):
    rows, u, B = padded(T * K, N), torch.randn(T * K, R), torch.randn(2, N, R)
    expected = updated(rows, u, B, dispatch, some.experts.experts)
    triton_low_rank.add_low_rank(rows, u, some.spread(B).mT, *some.groups)
    assert_output_close(rows, expected, torch.float32)


def test_rows_of_some_experts_are_projected_and_those_of_others_are_zero(dispatch, some):
    rows, A = padded(T * K, N), torch.randn(2, R, N)
    rows[some.is_idle(dispatch)] = float("nan")
    nothing = torch.zeros(T * K, R)
    expected = updated(nothing, rows, A, dispatch, some.experts.experts)
    u = triton_low_rank.project(rows, some.spread(A).mT, *some.groups)
    served = int(dispatch.offsets[-1])
    assert_output_close(u[:served], expected[:served], torch.float32)
    assert not u[:served][some.is_idle(dispatch)[:served]].any()


@pytest.mark.parametrize("sizes", [(R, N), (N, R), (R, 300)], ids=str)
def test_outer_products_of_the_rows_of_some_experts(dispatch, some, sizes):
    left, right = padded(T * K, sizes[0]), padded(T * K, sizes[1])
    for operand in (left, right):
        operand[some.is_idle(dispatch)] = float("nan")
        operand[dispatch.offsets[-1] :] = float("nan")
    products = some.runs.collect(triton_low_rank.outer(left, right, *some.groups))
    bounds = [0, *dispatch.offsets.tolist()]
    rows = [slice(bounds[expert], bounds[expert + 1]) for expert in some.experts.experts]
    expected = torch.stack([left[each].double().T @ right[each].double() for each in rows])
    assert_gradient_close(products, expected, torch.float32, "factor")


def test_rows_whose_columns_lie_apart_are_left_to_torch(dispatch, some, monkeypatch):
    monkeypatch.setattr(on_triton, "takes", lambda rows: True)
    rows, A = torch.randn(N, T * K).t(), torch.randn(2, R, N)
    factor = some.runs.spread(A).mT
    found, expected = (low_rank_rows.project(each, factor, *some.groups) for each in (rows, rows.contiguous()))
    served = int(dispatch.offsets[-1])
    assert_output_close(found[:served], expected[:served].double(), torch.float32)
    u = torch.randn(R, T * K).t()
    products = low_rank_rows.outer(u, rows, *some.groups)
    expected = low_rank_rows.outer(u.contiguous(), rows.contiguous(), *some.groups)
    assert_gradient_close(some.runs.collect(products), some.runs.collect(expected).double(), torch.float32, "factor")


CLASSES = (Chosen((0, 3, 7, 8)), Chosen((2, 11), r=12))
LAYOUTS = {
    "all experts": {},
    "some experts": {"selected": (Chosen((1, 4)),)},
    "classes of ranks": {"E": 20, "selected": CLASSES},
    "classes of ranks, dropout": {"E": 20, "selected": CLASSES, "dropout": 0.25, "bias": True},
    "up of some, down of all": {"E": 20, "selected": {"up": CLASSES, "down": None}},
    "some experts, slots of no expert": {"E": 20, "T": 70, "selected": CLASSES, "sentinels": True},
    "adapters that overlap": {"selected": (Chosen((1, 4)), Chosen((0, 4), r=16, adapter=1))},
    "rank beyond a tile": {"selected": (Chosen((1, 4), r=72),)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_whole_mlp(layout, monkeypatch):
    case = make_case(H=24, I=20, dtype=torch.float32, **LAYOUTS[layout])
    expected, expected_gradients = case.double().run(experts_mlp_reference)
    monkeypatch.setattr(fused, "_back_end", lambda hidden: fused_grouped)
    monkeypatch.setattr(on_triton, "takes", lambda rows: True)
    out, gradients = case.run(fused.fused_experts_mlp)
    assert_output_close(out, expected, torch.float32)
    for name, gradient in gradients.items():
        assert_gradient_close(gradient, expected_gradients[name], torch.float32, name)


@pytest.mark.parametrize("weighted", [True, False])
def test_results_of_a_token_are_summed_and_rows_of_no_expert_left_out(dispatch, weighted):
    rows, weights = padded(T * K, N), torch.rand(T, K)
    served = rows.double()
    served[dispatch.offsets[-1] :] = 0
    slots = dispatch.to_slots(served)
    expected = (slots * weights.double().unsqueeze(-1) if weighted else slots).sum(1)
    rows[dispatch.offsets[-1] :] = float("nan")
    assert_output_close(triton_rows.combine(rows, weights if weighted else None, dispatch), expected, torch.float32)
