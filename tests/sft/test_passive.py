"""To look changes nothing: metrics off, in summary or in full, the weights are the same bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests.families import build
from tests.sft.runs import joined, rows, sft, trained_weights
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.sft import watch

RUN = {"num_train_epochs": 1, "learning_rate": 1e-2, "max_grad_norm": 1.0}
FROZEN = ["experts", "attention"]
TRAINED = [*FROZEN, "router"]
CASES = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "router_aux_loss_coef": 0.1, "router_losses": {"drift_kl": 1}},
    "the coefficient of the model's config": {"target": TRAINED},
    "bfloat16": {"target": TRAINED, "dtype": torch.bfloat16, "bf16": True},
    "a copy of the router": {"router_mode": "full"},
}


def weights_after(folder, metrics, target=FROZEN, dtype=torch.float32, router_mode=None, **options):
    if "eval_strategy" in options:
        options["others"] = {"eval_dataset": sft(folder).train_dataset}
    trainer = sft(
        folder,
        build("qwen3_moe").to(dtype),
        peft_config=MoeLoraConfig(r=4, moe_target=target, router_mode=router_mode, lora_dropout=0.3),
        router_metrics=metrics,
        **RUN,
        **options,
    )
    before = trained_weights(trainer.model)
    trainer.train()
    after = trained_weights(trainer.model)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    return after


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_weights_are_the_same(tmp_path, options):
    off = weights_after(tmp_path / "off", "off", **options)
    for metrics in ("summary", "full"):
        assert_same(weights_after(tmp_path / metrics, metrics, **options), off)


def test_random_numbers_of_their_own_would_be_noticed(tmp_path, monkeypatch):
    base_pass = watch.RouterWatch.base_pass

    def draws(self, inputs):
        torch.rand(1)
        return base_pass(self, inputs)

    off = weights_after(tmp_path / "off", "off")
    monkeypatch.setattr(watch.RouterWatch, "base_pass", draws)
    with pytest.raises(AssertionError):
        assert_same(weights_after(tmp_path / "full", "full"), off)


class FreezesHalf(TrainerCallback):
    """Of the factors, as LoRA-FA does."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)


def test_what_the_user_has_frozen_stays_frozen(tmp_path):
    """PEFT makes an adapter that was switched off trainable when it is switched on again, all of it."""
    trainer = sft(tmp_path, router_metrics="full", **RUN)
    trainer.add_callback(FreezesHalf())
    before = trained_weights(trainer.model)
    trainer.train()
    after = trained_weights(trainer.model)
    assert after.keys() == {name for name in before if "lora_A" not in name}


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_no_hook_is_left_on_the_model(tmp_path):
    trainer = sft(tmp_path, peft_config=MoeLoraConfig(r=4), router_metrics="full", router_aux_loss_coef=0.1)
    before = hooks(trainer.model)
    trainer.train()
    assert hooks(trainer.model) == before
    trainer.model.train()
    with trainer._session.batch(joined(rows())):
        assert hooks(trainer.model) > before
