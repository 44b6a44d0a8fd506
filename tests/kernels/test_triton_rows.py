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

from tests.tolerances import assert_gradient_close, assert_output_close
from trl_moe_ext.kernels import triton_rows
from trl_moe_ext.kernels.dispatch import sort_by_expert
from trl_moe_ext.kernels.gates import GATES, Gate
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


@pytest.fixture
def dispatch():
    """Some slots belong to no expert, some experts have no row."""
    index = torch.stack([torch.randperm(E + 2)[:K] for _ in range(T)])
    index[index == 2] = E + 3
    return sort_by_expert(index, E)


def test_low_rank_update_is_added_to_the_rows_of_its_expert(dispatch):
    rows, u, B = padded(T * K, N), torch.randn(T * K, R), torch.randn(E, N, R)
    expected, start = rows.double(), 0
    for expert, end in enumerate(dispatch.offsets.tolist()):
        expected[start:end] += u[start:end].double() @ B[expert].double().T
        start = end
    triton_rows.add_low_rank(rows, u, B.mT, dispatch.offsets)
    assert_output_close(rows, expected, torch.float32)


def test_low_rank_update_of_some_experts_is_added_to_their_rows(dispatch):
    """Of runs of experts: those between two that are selected have zeros together."""
    some = SelectedExperts((1, 4), E)
    runs = some.runs(torch.device("cpu"))
    rows, u, B = padded(T * K, N), torch.randn(T * K, R), torch.randn(2, N, R)
    expected, start = rows.double(), 0
    for expert, end in enumerate(dispatch.offsets.tolist()):
        if expert in some.experts:
            expected[start:end] += u[start:end].double() @ B[some.experts.index(expert)].double().T
        start = end
    triton_rows.add_low_rank(rows, u, runs.spread(B).mT, dispatch.offsets[runs.last])
    assert_output_close(rows, expected, torch.float32)


@pytest.mark.parametrize("weighted", [True, False])
def test_results_of_a_token_are_summed_and_rows_of_no_expert_left_out(dispatch, weighted):
    rows, weights = padded(T * K, N), torch.rand(T, K)
    served = rows.double()
    served[dispatch.offsets[-1] :] = 0
    slots = dispatch.to_slots(served)
    expected = (slots * weights.double().unsqueeze(-1) if weighted else slots).sum(1)
    rows[dispatch.offsets[-1] :] = float("nan")
    assert_output_close(triton_rows.combine(rows, weights if weighted else None, dispatch), expected, torch.float32)
