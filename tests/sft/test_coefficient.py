"""`router_aux_loss_coef` has TRL's name and our loss: what None means, and that the parent's loss never runs."""

from __future__ import annotations

import logging

import pytest
from transformers.models.mixtral import modeling_mixtral
from trl import SFTConfig

from tests.families import build
from tests.sft.runs import logged, sft
from trl_moe_ext import MoeLoraConfig, MoeSFTTrainer

DECLARED = 0.25  # by the model's config
FROZEN, TRAINED = ["experts", "attention"], ["experts", "router"]


def model(**overrides):
    return build("qwen3_moe", **{"router_aux_loss_coef": DECLARED, **overrides})


def on(target):
    return MoeLoraConfig(r=4, moe_target=target)


@pytest.fixture
def notes(caplog):
    """What is said about the coefficient."""
    caplog.set_level(logging.WARNING, logger="trl_moe_ext")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("trl_moe_ext")]


@pytest.fixture(autouse=True)
def _no_loss_of_the_parent(monkeypatch):
    def runs(*args, **kwargs):
        raise AssertionError("the parent's own loss runs")

    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", runs)
    monkeypatch.setattr("transformers.models.qwen3_moe.modeling_qwen3_moe.load_balancing_loss_func", runs)


def test_nothing_given_and_a_frozen_router(tmp_path, notes):
    trainer = sft(tmp_path, model(), peft_config=on(FROZEN), router_metrics="summary")
    trainer.train()
    (note,) = notes()
    assert "is frozen, so router_aux_loss_coef is 0.0 and not the 0.25 of the model's config" in note
    assert "logged all the same" in note
    assert len(logged(trainer, "router/aux_loss")) == 4
    assert not logged(trainer, "router/loss/load_balancing")


def test_nothing_is_promised_where_nothing_is_logged(tmp_path, notes):
    sft(tmp_path, model(), peft_config=on(FROZEN), router_metrics="off")
    (note,) = notes()
    assert "logged" not in note


@pytest.mark.parametrize("metrics", ["off", "summary"])
def test_nothing_given_and_a_trained_router(tmp_path, notes, metrics):
    """Which is also what makes the weights the same with and without metrics."""
    trainer = sft(tmp_path, model(), peft_config=on(TRAINED), router_metrics=metrics)
    assert trainer._session.objective.names == ["load_balancing"]
    trainer.train()
    assert notes() == []
    if metrics != "off":
        values = logged(trainer, "router/aux_loss")
        assert logged(trainer, "router/loss/load_balancing") == pytest.approx([DECLARED * value for value in values])


@pytest.mark.parametrize("declared", [0.0, None], ids=["zero in the config", "not in the config"])
def test_nothing_given_and_nothing_declared(tmp_path, notes, declared):
    made = model(router_aux_loss_coef=0.0) if declared == 0.0 else build("deepseek_v3")
    assert getattr(made.config, "router_aux_loss_coef", None) == declared
    trainer = sft(tmp_path, made, peft_config=on(FROZEN), router_metrics="off")
    assert trainer._session is None
    assert notes() == []


@pytest.mark.parametrize("given", [None, 0.0, 0.125])
@pytest.mark.parametrize("target", [FROZEN, TRAINED], ids=["frozen", "trained"])
def test_options_and_config_are_left_as_they_are(tmp_path, given, target):
    trainer = sft(tmp_path, model(), peft_config=on(target), router_aux_loss_coef=given)
    assert trainer.args.router_aux_loss_coef == given
    assert trainer.model.config.router_aux_loss_coef == (DECLARED if given is None else given)
    assert trainer.router_aux_loss_coef == 0.0
    assert not trainer.aux_loss_enabled


def test_options_are_left_as_they_are_by_a_parent_that_fails(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, router_aux_loss_coef=0.125)
    with pytest.raises(ValueError, match="train_dataset"):
        MoeSFTTrainer(model(), args)
    assert args.router_aux_loss_coef == 0.125


def test_a_model_that_was_loaded_with_router_logits_does_not_compute_the_loss_itself(tmp_path):
    trainer = sft(tmp_path, model(output_router_logits=True), router_aux_loss_coef=0.5)
    trainer.train()
    assert trainer.model.config.output_router_logits is False
