"""Several active adapters run as one product: on one kernel, which all of them name."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from tests.families import build, inputs
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.census.weights import randomise_factors
from trl_moe_ext.kernels.experts_mlp import experts_mlp
from trl_moe_ext.kernels.registry import Kernel
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts, adapter_kernels

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
BOTH = ["default", "second"]


def model_with(first, second):
    stock = build("qwen3_moe", torch.float64)
    stock.config._experts_implementation = "eager"  # grouped products of stock experts take no float64
    model = get_peft_model(stock, MoeLoraConfig(**first), autocast_adapter_dtype=False)
    model.add_adapter("second", MoeLoraConfig(**second), autocast_adapter_dtype=False)
    for seed, adapter in enumerate(BOTH):
        randomise_factors(model, adapter, seed)
    return model.eval()


def output(model):
    with torch.no_grad():
        return model(**inputs("qwen3_moe")).logits


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ({"kernel": "reference"}, {}, r"'default' has kernel='reference'; 'second' has kernel='fused'"),
        ({"save_activations": "none"}, {}, r"'default' has kernel='fused', save_activations='none'; 'second' has "),
    ],
)
def test_adapters_on_different_kernels_are_refused_together(first, second, told):
    model = model_with(first, second)
    expected = output(model)
    with pytest.raises(ConfigError, match=rf"cannot be active together .*{told}.*the same kernel"):
        model.base_model.set_adapter(BOTH)
    assert model.active_adapters == ["default"]
    assert all(module.active_adapters == ["default"] for module in model.modules() if hasattr(module, "lora_A"))
    assert torch.equal(output(model), expected)
    model.set_adapter("second")
    assert not torch.allclose(output(model), expected)


def test_a_layer_refuses_them_too():
    """What transformers calls, which has no model of PEFT's."""
    layer = next(m for m in model_with({"kernel": "reference"}, {}).modules() if isinstance(m, MoeLoraExperts))
    with pytest.raises(ConfigError, match="cannot be active together"):
        layer.set_adapter(BOTH)
    assert layer.active_adapters == ["default"]


@pytest.fixture
def plain(monkeypatch):
    """A kernel of a plug-in that knows updates of all experts only."""
    kernel = Kernel("plain", "for tests", experts_mlp)
    lookup = adapter_kernels.host().lookup
    monkeypatch.setattr(
        adapter_kernels.host(), "lookup", lambda hook, name: kernel if name == "plain" else lookup(hook, name)
    )


def test_a_selection_does_not_get_to_a_kernel_that_takes_none(plain):
    chosen = {name: [1, 3] for name in LAYERS}
    with pytest.raises(ConfigError, match="'plain' runs updates of all experts only"):
        model_with({"kernel": "plain"}, {"kernel": "plain", "selected_experts": chosen})
    model = model_with({"kernel": "plain"}, {"selected_experts": chosen})
    with pytest.raises(ConfigError, match=r"cannot be active together .*'default' has kernel='plain'"):
        model.base_model.set_adapter(BOTH)


def test_adapters_on_one_kernel_are_active_together():
    model = model_with({"kernel": "reference"}, {"kernel": "reference", "r": 2})
    model.base_model.set_adapter(BOTH)
    together = output(model)
    merged = model.merge_and_unload(adapter_names=BOTH)
    torch.testing.assert_close(output(merged), together, rtol=1e-9, atol=1e-11)


def test_adapters_on_different_kernels_are_merged_one_after_the_other():
    model, same = model_with({"kernel": "reference"}, {"r": 2}), model_with({}, {"r": 2})
    same.base_model.set_adapter(BOTH)
    expected = output(same)
    torch.testing.assert_close(output(model.merge_and_unload(adapter_names=BOTH)), expected, rtol=1e-9, atol=1e-11)


def test_a_kernel_that_is_left_is_no_obstacle():
    model = model_with({"kernel": "reference"}, {})
    model.set_adapter("second")
    model.delete_adapter("default")
    model.add_adapter("default", MoeLoraConfig())
    model.base_model.set_adapter(BOTH)
    assert torch.isfinite(output(model)).all()
