"""`router_learning_rate`: parameters of the routers in groups of their own, whatever the optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.families import build
from tests.sft.runs import sft, trained_weights
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.sft.trained_router import router_parameters, set_learning_rate


def test_a_learning_rate_of_its_own(tmp_path):
    trainer = sft(tmp_path, learning_rate=1e-3, router_learning_rate=1e-2, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    mine = {id(p) for p in router_parameters(trainer._routers)}
    everything = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert mine
    assert len(in_groups) == len(set(in_groups))
    assert set(in_groups) == everything
    for group in optimizer.param_groups:
        is_router = {id(p) in mine for p in group["params"]}
        assert is_router == {group["lr"] == 1e-2}
        assert group["weight_decay"] == 0.1


def test_a_schedule_scales_both(tmp_path):
    trainer = sft(
        tmp_path, learning_rate=1e-3, router_learning_rate=1e-2, lr_scheduler_type="linear", num_train_epochs=2
    )
    trainer.train()
    start, end = ([group[name] for group in trainer.optimizer.param_groups] for name in ("initial_lr", "lr"))
    assert sorted(start) == [1e-3, 1e-2]
    assert end == [0.0, 0.0]
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3


def test_weights_move_by_their_rate(tmp_path):
    """With a rate of zero for the rest, only the routers move; and the other way round."""
    for rest, own in ((0.0, 1e-2), (1e-2, 0.0)):
        trainer = sft(tmp_path, learning_rate=rest, router_learning_rate=own, max_steps=1)
        before = trained_weights(trainer.model)
        trainer.train()
        after = trained_weights(trainer.model)
        for name, weight in before.items():
            moves = (".gate." in name) == (own > 0)
            assert torch.equal(weight, after[name]) is not moves, name


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd", "adamw_torch_fused"])
def test_any_optimizer(tmp_path, optim):
    trainer = sft(tmp_path, learning_rate=1e-3, router_learning_rate=1e-2, optim=optim, max_steps=1)
    before = trained_weights(trainer.model)
    trainer.train()
    assert not any(torch.equal(before[name], weight) for name, weight in trained_weights(trainer.model).items())


def test_a_rate_for_a_frozen_router_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="router_learning_rate has no effect: the router is frozen"):
        sft(tmp_path, peft_config=MoeLoraConfig(r=4), router_learning_rate=1e-2)


def test_a_rate_beside_an_optimizer_of_the_user_is_refused(tmp_path):
    model = build("qwen3_moe")
    mine = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="no effect on an optimizer that is given to the trainer"):
        sft(tmp_path, model, router_learning_rate=1e-2, others={"optimizers": (mine, None)})


def test_groups_keep_what_else_they_have():
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.AdamW(
        [{"params": [first, second], "weight_decay": 0.3}, {"params": [third], "weight_decay": 0.0}], lr=0.1
    )
    set_learning_rate(optimizer, [second, third], 0.2)
    groups = [(group["lr"], group["weight_decay"], group["params"]) for group in optimizer.param_groups]
    assert groups == [(0.1, 0.3, [first]), (0.2, 0.3, [second]), (0.2, 0.0, [third])]
