"""A run that goes on from a checkpoint is the uninterrupted one: weights, metrics and the history of the load."""

from __future__ import annotations

import json

import pytest
import torch

from tests.sft.runs import rows, sft, trained_weights
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.router.history import HISTORY_FILE

STEPS = [1, 2, 3, 4]
RUN = {
    "data": rows(20),
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 1e-2,
    "max_grad_norm": 1.0,
    "gradient_accumulation_steps": 2,
    "router_metrics": "full",
    "router_aux_loss_coef": 0.1,
    "router_learning_rate": 2e-2,
}


def trainer_in(folder, **options):
    adapter = MoeLoraConfig(r=4, moe_target=["experts", "attention", "router"], lora_dropout=0.2)
    return sft(folder, peft_config=adapter, **RUN | options)


def router_log(trainer):
    """Step -> what was logged of the routers."""
    found = [{key: value for key, value in row.items() if key == "step" or "router/" in key} for row in _rows(trainer)]
    return {row.pop("step"): row for row in found}


def _rows(trainer):
    return [row for row in trainer.state.log_history if "loss" in row]


def history(folder):
    records = json.loads((folder / HISTORY_FILE).read_text())["records"]
    return {record["step"]: record["layers"] for record in records}


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_everything_is_that_of_the_uninterrupted_run(tmp_path, logging_steps):
    folder = tmp_path / "run"
    through = trainer_in(folder, logging_steps=logging_steps)
    through.train()
    weights, loads = trained_weights(through.model), history(folder)
    # The first run went on to step 4, as one does that is killed after a checkpoint.
    again = trainer_in(folder, logging_steps=logging_steps)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert all(torch.equal(weight, weights[name]) for name, weight in trained_weights(again.model).items())
    assert history(folder) == loads
    assert [*loads] == STEPS[logging_steps - 1 :: logging_steps]
    assert router_log(again) == router_log(through)
    assert router_log(again)[4]["router/loss/load_balancing"] > 0


def test_a_new_run_in_the_same_folder_starts_anew(tmp_path):
    trainer_in(tmp_path).train()
    trainer_in(tmp_path, max_steps=3).train()
    assert [*history(tmp_path)] == [1, 2, 3]


def test_another_folder_has_the_history_from_there_on(tmp_path):
    trainer_in(tmp_path / "first").train()
    trainer_in(tmp_path / "second").train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert [*history(tmp_path / "second")] == [3, 4]


def test_a_run_that_is_killed_has_its_history_up_to_the_last_checkpoint(tmp_path):
    class KilledError(Exception):
        pass

    trainer = trainer_in(tmp_path)
    step = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == 3:
            raise KilledError
        return step(*args, **kwargs)

    trainer.training_step = training_step
    with pytest.raises(KilledError):
        trainer.train()
    assert [*history(tmp_path)] == [1, 2]
