"""Loss and every gradient with router losses are those of an independent computation on the same batch."""

from __future__ import annotations

import pytest
import torch

from tests.sft.runs import joined, rows, sft, train
from tests.sft.yardstick import expected
from tests.tolerances import RELATIVE_ERROR, assert_gradient_close
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.sft import objective

FAMILIES = {"qwen3_moe": "softmax", "deepseek_v3": "sigmoid"}
COEFFICIENTS = {"load_balancing": 0.5, "z_loss": 0.1, "drift_kl": 2.0}


def step(tmp_path, model_type, coefficients, adapter="default"):
    """The trainer and what it made of the one step with all sequences."""
    trainer = sft(
        tmp_path,
        model_type,
        peft_config=adapter,
        per_device_train_batch_size=8,
        router_aux_loss_coef=coefficients.get("load_balancing", 0.0),
        router_losses={name: c for name, c in coefficients.items() if name != "load_balancing"},
    )
    with torch.no_grad():
        for name, copy in trainer.model.named_parameters():
            if "modules_to_save" in name:
                copy.add_(torch.randn(copy.shape, generator=torch.Generator().manual_seed(2)), alpha=0.2)
    (loss,), (gradients,) = train(trainer)
    return trainer, loss, gradients


def assert_as_expected(trainer, loss, gradients, coefficients):
    expected_loss, expected_gradients = expected(trainer.model, joined(rows()), coefficients)
    assert loss == pytest.approx(expected_loss, rel=RELATIVE_ERROR[torch.float32][0])
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert_gradient_close(gradients[name], gradient, torch.float32, name)


@pytest.mark.parametrize("model_type", FAMILIES, ids=FAMILIES.get)
@pytest.mark.parametrize("names", [[], ["load_balancing"], ["z_loss"], ["drift_kl"], [*COEFFICIENTS]], ids="+".join)
def test_loss_and_gradients(tmp_path, model_type, names):
    coefficients = {name: COEFFICIENTS[name] for name in names}
    assert_as_expected(*step(tmp_path, model_type, coefficients), coefficients)


@pytest.mark.parametrize("model_type", FAMILIES, ids=FAMILIES.get)
def test_a_router_that_is_trained_in_full(tmp_path, model_type):
    adapter = MoeLoraConfig(r=4, router_mode="full")
    trainer, loss, gradients = step(tmp_path, model_type, COEFFICIENTS, adapter)
    assert any("gate.modules_to_save" in name for name in gradients)
    assert_as_expected(trainer, loss, gradients, COEFFICIENTS)


def test_one_layer_that_is_left_out_would_be_noticed(tmp_path, monkeypatch):
    whole = objective._sum
    monkeypatch.setattr(objective, "_sum", lambda shares: whole([*shares][1:]))
    done = step(tmp_path, "qwen3_moe", COEFFICIENTS)
    with pytest.raises(AssertionError):
        assert_as_expected(*done, COEFFICIENTS)


def test_padding_that_counts_would_be_noticed(tmp_path, monkeypatch):
    from trl_moe_ext.sft import session

    monkeypatch.setattr(session, "kept_tokens", lambda inputs: None)
    done = step(tmp_path, "qwen3_moe", COEFFICIENTS)
    with pytest.raises(AssertionError):
        assert_as_expected(*done, COEFFICIENTS)
