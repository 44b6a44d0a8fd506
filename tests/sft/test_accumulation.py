"""Micro-batches of gradient accumulation make the loss and the gradients of the joined batch, dropout included."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.sft.runs import joined, rows, sft, train
from tests.sft.yardstick import expected
from tests.tolerances import RELATIVE_ERROR, assert_gradient_close, relative_error
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.sft import session

ROWS = rows(20)  # steps of eight, eight and the last of four
COEFFICIENTS = {"load_balancing": 0.5, "z_loss": 0.1}
# per_device_train_batch_size x gradient_accumulation_steps
SPLITS = {"8x1": (1, 8), "4x2": (2, 4), "2x4": (4, 2)}


def accumulated(tmp_path, split, **options):
    size, steps = split
    return sft(
        tmp_path,
        data=ROWS,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        **{"router_aux_loss_coef": 0.5, "router_losses": {"z_loss": 0.1}} | options,
    )


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_every_step_is_that_of_the_joined_batch(tmp_path, split):
    trainer = accumulated(tmp_path, split)
    losses, steps = train(trainer)
    assert len(losses) == len(steps) == 3
    for i, (loss, gradients) in enumerate(zip(losses, steps, strict=True)):
        expected_loss, expected_gradients = expected(trainer.model, joined(ROWS[8 * i : 8 * i + 8]), COEFFICIENTS)
        assert loss == pytest.approx(expected_loss, rel=RELATIVE_ERROR[torch.float32][0])
        for name, gradient in expected_gradients.items():
            assert_gradient_close(gradients[name], gradient, torch.float32, name)


def test_losses_without_counts_need_no_pass_ahead(tmp_path, monkeypatch):
    """Only the number of tokens of the step is needed, which the batches tell."""
    monkeypatch.setattr(session.RouterSession, "_route", None)
    trainer = accumulated(tmp_path, SPLITS["4x2"], router_aux_loss_coef=0.0)
    (loss, *_), (gradients, *_) = train(trainer)
    expected_loss, expected_gradients = expected(trainer.model, joined(ROWS[:8]), {"z_loss": 0.1})
    assert loss == pytest.approx(expected_loss, rel=RELATIVE_ERROR[torch.float32][0])
    for name, gradient in expected_gradients.items():
        assert_gradient_close(gradients[name], gradient, torch.float32, name)


def test_running_counts_are_another_loss(tmp_path):
    """What `exact` pays for: gradients of the routers are off by far more than rounding."""
    trainer = accumulated(tmp_path, SPLITS["8x1"], router_counts="running", router_losses=None)
    losses, steps = train(trainer)
    for i, (loss, gradients) in enumerate(zip(losses, steps, strict=True)):
        expected_loss, expected_gradients = expected(
            trainer.model, joined(ROWS[8 * i : 8 * i + 8]), {"load_balancing": 0.5}
        )
        assert loss == pytest.approx(expected_loss, rel=0.1)
        assert loss != pytest.approx(expected_loss, rel=1e-3)
        errors = [relative_error(gradients[name], expected_gradients[name]) for name in gradients if ".gate." in name]
        assert max(errors) > 0.01


def counted_ahead_and_trained(tmp_path, monkeypatch, **options):
    """Of every step: choices of the experts that were counted ahead, and those of the passes that were trained."""
    pairs = []
    begin = session.RouterSession.begin_step

    def compare(self, batches):
        if self._counter.is_counted:
            pairs.append((self._counter._ahead.counts, self.step_counts()))
        begin(self, batches)

    monkeypatch.setattr(session.RouterSession, "begin_step", compare)
    adapter = MoeLoraConfig(r=4, moe_target=["experts", "attention", "router"], lora_dropout=0.5)
    trainer = accumulated(tmp_path, SPLITS["4x2"], peft_config=adapter, **options)
    train(trainer)
    trainer._session.begin_step([])  # the last one
    assert len(pairs) == 3
    return pairs


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_dropout_is_the_same_in_both_passes(tmp_path, monkeypatch, checkpointing):
    """The joined batch draws other masks, so its gradients cannot be compared; the choices of the experts can."""
    for ahead, trained in counted_ahead_and_trained(tmp_path, monkeypatch, gradient_checkpointing=checkpointing):
        assert ahead.keys() == trained.keys()
        assert all(torch.equal(ahead[label], trained[label]) for label in ahead)


def test_dropout_of_its_own_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "forked_rng", lambda model: torch.random.fork_rng([], enabled=False))
    pairs = counted_ahead_and_trained(tmp_path, monkeypatch)
    assert not all(torch.equal(ahead[label], trained[label]) for ahead, trained in pairs for label in ahead)


def test_gradients_survive_mixed_precision(tmp_path):
    """Autocast keeps the bfloat16 copies of weights that a pass without gradients has made."""
    run = partial(accumulated, split=SPLITS["4x2"], bf16=True, router_losses=None)
    _, exact = train(run(tmp_path))
    _, running = train(run(tmp_path, router_counts="running"))
    for name, gradient in running[0].items():
        assert relative_error(exact[0][name], gradient) < 0.5, name
