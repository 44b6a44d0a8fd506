"""A router that is trained: float32 in a model of bfloat16, with a learning rate of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.families import build
from tests.sft.runs import joined, rows, sft, trained_weights
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.sft.trained_router import compute_in_float32, router_parameters, set_learning_rate

HALF = torch.bfloat16
FAMILIES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "dbrx", "llama4_text", "jetmoe", "granitemoe"]


def on(*target, **options):
    return MoeLoraConfig(r=4, moe_target=[*target], **options)


def half(folder, target, model_type="qwen3_moe", **options):
    """A trainer of a model whose weights are bfloat16, under autocast."""
    return sft(folder, build(model_type, dtype=HALF), peft_config=target, bf16=True, **options)


def outputs_of(trainer, modules):
    """What the modules return in a forward of the trainer, in the order of the modules."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda module, args, output: seen.setdefault(id(module), output))
        for module in modules
    ]
    batch = trainer._prepare_inputs(joined(rows(2)))
    trainer.model.train()
    trainer.compute_loss(trainer.accelerator.prepare(trainer.model), batch).backward()
    for handle in handles:
        handle.remove()
    return [seen[id(module)] for module in modules]


def dtypes(output):
    return [part.dtype for part in output if isinstance(part, torch.Tensor) and part.is_floating_point()]


def test_weights_and_logits_are_float32_and_the_rest_is_not(tmp_path):
    trainer = half(tmp_path, on("experts", "router"))
    routers = trainer._routers
    assert {p.dtype for router in routers for p in router.module.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.model.get_base_model().model.embed_tokens.parameters()} == {HALF}
    for output in outputs_of(trainer, [router.module for router in routers]):
        logits, weights = dtypes(output)
        assert (logits, weights) == (torch.float32, HALF)
    for parameter in router_parameters(routers):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0


def test_a_frozen_router_is_left_alone(tmp_path):
    trainer = half(tmp_path, on("experts", "attention"), router_metrics="full")
    for router in find_routers(trainer.model):
        assert {p.dtype for p in router.module.parameters()} == {HALF}
        assert not router.module._forward_hooks
        assert not router.module._forward_pre_hooks
    for output in outputs_of(trainer, [router.module for router in trainer._routers]):
        assert set(dtypes(output)) == {HALF}


def test_a_frozen_router_beside_trained_ones_is_left_alone(tmp_path):
    trainer = half(tmp_path, on("experts", "router", layers_to_transform=[1]))
    first, second = ({p.dtype for p in router.module.parameters()} for router in find_routers(trainer.model))
    assert (first, second) == ({HALF}, {torch.float32})


def test_products_are_exact_to_float32(tmp_path):
    """A product in bfloat16 is off by some 2^-9, and near ties between experts would be decided by that."""
    trainer = half(tmp_path, on("experts", "router"), randomised=False)
    router = trainer._routers[0].module
    given = []
    handle = router.register_forward_pre_hook(lambda module, args: given.append(args[0].detach()))
    ((logits, *_),) = outputs_of(trainer, [router])
    handle.remove()
    plain = find_routers(trainer.model)[0].own.weight.detach()
    expected = given[0].flatten(0, -2).double() @ plain.double().T
    assert (logits.double() - expected).norm() / expected.norm() < 1e-6
    in_half = given[0].flatten(0, -2).to(HALF) @ plain.to(HALF).T
    assert (in_half.double() - expected).norm() / expected.norm() > 1e-4


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_families_take_what_a_router_in_float32_gives(tmp_path, model_type, mode):
    trainer = half(
        tmp_path, on("experts", router_mode=mode), model_type, max_steps=1, learning_rate=1e-3, router_metrics="full"
    )
    before = trained_weights(trainer.model)
    trainer.train()
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for parameter in router_parameters(trainer._routers):
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, before[names[id(parameter)]])


def test_a_second_trainer_of_the_same_model_changes_nothing(tmp_path):
    first = half(tmp_path, on("experts", "router"), router_aux_loss_coef=0.1)
    losses = []
    for trainer in (first, sft(tmp_path, first.model, peft_config=None, bf16=True, router_aux_loss_coef=0.1)):
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, joined(rows())).item())
    assert losses[0] == losses[1]


def test_autocast_is_on_again_when_a_router_fails():
    model = build("qwen3_moe", dtype=HALF)
    (router, _) = find_routers(model)
    compute_in_float32(router)
    with torch.autocast("cpu", dtype=HALF):
        with pytest.raises(RuntimeError, match="shape"):
            router.module(torch.ones(3, 5, dtype=HALF))
        assert torch.is_autocast_enabled("cpu")
        assert nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == HALF


def rates(optimizer):
    """Learning rate of each group, and the numbers of its parameters."""
    return [(group["lr"], len(group["params"])) for group in optimizer.param_groups]


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
        sft(tmp_path, peft_config=on("experts"), router_learning_rate=1e-2)


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
