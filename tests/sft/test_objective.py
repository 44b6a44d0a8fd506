"""Losses that would train nothing, or mean nothing, are refused."""

from __future__ import annotations

import pytest

from tests.sft.runs import sft
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.sft.objective import RouterObjective, StepTotals


def test_a_loss_on_logits_is_refused_where_there_are_probabilities(tmp_path):
    trainer = sft(tmp_path, "gemma4_text", router_aux_loss_coef=0.0, router_losses={"z_loss": 1e-3})
    with pytest.raises(
        ConfigError, match=r"z_loss: no meaning for router .*\(Gemma4TextRouter\), which hands out prob"
    ):
        trainer.train()


def test_the_same_router_can_be_balanced(tmp_path):
    sft(tmp_path, "gemma4_text", router_aux_loss_coef=0.01).train()


def test_a_batch_that_no_router_was_seen_in_is_an_error():
    objective = RouterObjective({"load_balancing": 0.1})
    with pytest.raises(ConfigError, match="load_balancing: no router was seen in this batch"):
        objective.shares([], StepTotals({}, {}), None, layers=2)
