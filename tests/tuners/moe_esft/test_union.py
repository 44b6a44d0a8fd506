"""Several active adapters: what their experts are together is found once, and follows what is active."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.families import build
from tests.tolerances import assert_gradient_close, assert_output_close, relative_error
from trl_moe_ext.experts.census.esft_checks import randomise_deltas
from trl_moe_ext.kernels.selected import SelectedExperts
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig, MoeEsftExperts
from trl_moe_ext.tuners.moe_esft import layer as layer_module
from trl_moe_ext.tuners.moe_esft.deltas import joint_selection

LAYER = "model.layers.0.mlp.experts"
FIRST, SECOND, THIRD = [1, 3], [3, 4], [0, 6, 7]


def config(experts: list[int]) -> MoeEsftConfig:
    return MoeEsftConfig(moe_target=["experts"], selected_experts={LAYER: experts}, exclude_modules=".*layers.1.*")


@pytest.fixture
def model():
    model = get_peft_model(build("qwen3_moe"), config(FIRST)).eval()
    for name, experts in (("second", SECOND), ("third", THIRD)):
        model.add_adapter(name, config(experts))
    for seed, name in enumerate(("default", "second", "third")):
        randomise_deltas(model, name, seed)
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.fixture
def made(monkeypatch) -> list[list[tuple[int, ...]]]:
    """The selections of every union that is made."""
    calls = []

    def watched(selections):
        calls.append([selected.experts for selected in selections])
        return joint_selection(selections)

    monkeypatch.setattr(layer_module, "joint_selection", watched)
    return calls


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    index = torch.rand(9, 8, generator=g).topk(2, -1).indices
    return torch.randn(9, 64, generator=g), index, torch.rand(9, 2, generator=g)


def layer_of(model) -> MoeEsftExperts:
    (layer,) = (module for module in model.modules() if isinstance(module, MoeEsftExperts))
    return layer


def expected_of(layer: MoeEsftExperts, *adapters: str) -> Tensor:
    """By the family's own code, with merged weights."""
    twin = copy.deepcopy(layer)
    twin.merge(adapter_names=list(adapters))
    return twin.base_layer(*arguments())


def test_the_places_of_experts_in_their_union():
    union = joint_selection([SelectedExperts((1, 3), 8), SelectedExperts((0, 3, 7), 8)])
    assert union.experts == SelectedExperts((0, 1, 3, 7), 8)
    assert union.places == (SelectedExperts((1, 2), 4), SelectedExperts((0, 2, 3), 4))


def test_it_is_made_once_for_the_same_active_adapters_and_again_for_others(model, made):
    layer, seen = layer_of(model), []
    for active in (["default", "second"], ["default", "second"], ["second", "third"], ["third"], ["second", "third"]):
        model.base_model.set_adapter(active)
        assert_output_close(layer(*arguments()), expected_of(layer, *active), torch.float32)
        seen.append(len(made))
    assert seen == [1, 1, 2, 2, 2]
    assert made == [[(1, 3), (3, 4)], [(3, 4), (0, 6, 7)]]


def test_indices_are_sent_to_a_device_once(model, monkeypatch):
    layer = layer_of(model)
    layer._sum(["default", "second"])
    sent, tensor = [], torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda *args, **kwargs: sent.append(args) or tensor(*args, **kwargs))
    layer._sum(["default", "second"])
    assert sent == []


def test_an_adapter_that_is_deleted_and_added_again_with_other_experts(model, made):
    layer = layer_of(model)
    before = layer(*arguments())
    model.delete_adapter("second")
    assert layer._union is None
    model.add_adapter("second", config([5, 6]))
    randomise_deltas(model, "second", seed=8)
    model.base_model.set_adapter(["default", "second"])
    after = layer(*arguments())
    assert made[-1] == [(1, 3), (5, 6)]
    assert_output_close(after, expected_of(layer, "default", "second"), torch.float32)
    assert relative_error(after, before) > 1e-3


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_a_state_of_its_own(model, copied):
    layer = layer_of(model)
    expected = layer(*arguments())
    twin = copied(layer)
    assert_output_close(twin(*arguments()), expected, torch.float32)
    twin.delete_adapter("second")
    assert_output_close(twin(*arguments()), expected_of(layer, "default"), torch.float32)
    assert_output_close(layer(*arguments()), expected, torch.float32)


def test_nothing_of_a_trace_is_kept(model):
    layer, inputs = layer_of(model), arguments()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = compiled(*inputs)
    assert layer._union is None
    expected = layer(*inputs)
    assert_output_close(found, expected, torch.float32)
    assert_output_close(compiled(*inputs), expected, torch.float32)
    gradients = [
        torch.autograd.grad(run(*inputs).square().sum(), layer.esft_delta["second"].down_proj)[0]
        for run in (compiled, layer)
    ]
    assert_gradient_close(*gradients, torch.float32, "down_proj")


def test_fake_tensors_leave_none_behind(model):
    layer, inputs = layer_of(model), arguments()
    with FakeTensorMode(allow_non_fake_inputs=True):
        sums = layer._sum(["default", "second"])
        sums.selected.indices(inputs[0].device)
    assert isinstance(sums.down, FakeTensor)
    assert_output_close(layer(*inputs), expected_of(layer, "default", "second"), torch.float32)
