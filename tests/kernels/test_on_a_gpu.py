"""The fused expert MLP on a GPU: torch's grouped products and our Triton kernels, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import Chosen, interleaved, make_case, relu_squared
from tests.tolerances import assert_gradient_close, assert_output_close
from trl_moe_ext.kernels import on_triton
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.reference import experts_mlp_reference

pytestmark = pytest.mark.gpu

CLASSES = (Chosen((0, 3, 7, 8)), Chosen((2, 11), r=12))

# Sizes whose strides torch's grouped product takes, ranks that are padded, and sizes that it does not take.
LAYOUTS = {
    "gated": {"H": 64, "I": 48},
    "rank 5": {"H": 64, "I": 48, "r": 5},
    "rank 40": {"H": 64, "I": 48, "r": 40},
    "rank 130": {"H": 64, "I": 48, "r": 130},
    "padded rows": {"H": 64, "I": 21},
    "odd sizes": {"H": 37, "I": 21},
    "gpt-oss-like": {"H": 64, "I": 48, "transposed": True, "bias": True, "activation": interleaved},
    "no-gate": {"H": 64, "I": 48, "activation": relu_squared},
    "no-adapter": {"H": 64, "I": 48, "adapters": 0},
    "dropout": {"H": 64, "I": 48, "dropout": 0.25, "bias": True},
    "one-token": {"H": 64, "I": 48, "T": 1, "K": 4},
    "idle-experts": {"H": 64, "I": 48, "T": 3, "E": 40},
    "many-rows": {"H": 64, "I": 1536, "T": 600, "E": 3},
    "sentinels": {"H": 64, "I": 48, "T": 70, "sentinels": True, "bias": True},
    "some experts": {"H": 64, "I": 48, "selected": (Chosen((1, 4)),)},
    "one expert": {"H": 64, "I": 48, "T": 300, "selected": (Chosen((2,), r=40),)},
    "classes of ranks": {"H": 64, "I": 48, "T": 300, "E": 20, "selected": CLASSES},
    "classes of ranks, dropout": {"H": 64, "I": 48, "selected": CLASSES, "E": 20, "dropout": 0.25, "bias": True},
    "up of some, down of all": {"H": 64, "I": 48, "E": 20, "selected": {"up": CLASSES, "down": None}},
    "some experts, sentinels": {"H": 64, "I": 48, "T": 70, "E": 20, "selected": CLASSES, "sentinels": True},
    "adapters that overlap": {"H": 64, "I": 48, "selected": (Chosen((1, 4)), Chosen((0, 4), r=16, adapter=1))},
    "weights-on-input": {"H": 64, "I": 48, "weights_on_input": True, "transposed": True, "sentinels": True},
}


@pytest.fixture(autouse=True)
def _full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_reference(layout, dtype, triton, monkeypatch):
    if not triton:
        monkeypatch.setattr(on_triton, "takes", lambda rows: False)
    case = make_case(**LAYOUTS[layout], dtype=dtype)
    out, gradients = case.to("cuda").run(fused_experts_mlp)
    expected, expected_gradients = case.double().run(experts_mlp_reference)
    assert_output_close(out.cpu(), expected, dtype)
    for name, gradient in gradients.items():
        assert_gradient_close(gradient.cpu(), expected_gradients[name], dtype, name)


def test_triton_is_there():
    assert on_triton.takes(torch.ones(1, device="cuda"))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("layout", ["gated", "classes of ranks", "adapters that overlap"])
def test_the_device_is_never_waited_for(layout):
    case = make_case(**LAYOUTS[layout], dtype=torch.bfloat16).to("cuda")
    case.run(fused_experts_mlp)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(fused_experts_mlp)
    finally:
        torch.cuda.set_sync_debug_mode("default")
