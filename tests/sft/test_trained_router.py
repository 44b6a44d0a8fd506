"""A router that is trained is float32 in a model of bfloat16; one that is frozen is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.families import build
from tests.sft.runs import joined, rows, sft, trained_weights
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.sft.trained_router import compute_in_float32, router_parameters

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


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_merged_model_has_its_own_dtype_again(tmp_path, mode):
    """A block without an adapter calls its router with tokens in bfloat16: float32 weights would be an error."""
    model = build("qwen3_moe").to(torch.bfloat16)
    config = MoeLoraConfig(r=2, router_mode=mode)
    trainer = sft(tmp_path, model, peft_config=config, router_aux_loss_coef=0.1, learning_rate=0.1)
    trainer.train()
    routers = [router.own for router in find_routers(trainer.model)]
    assert any(p.dtype == torch.float32 for router in routers for p in router.parameters())
    merged = trainer.model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merged(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_a_second_trainer_adds_no_second_set_of_hooks(tmp_path):
    first = sft(tmp_path, "qwen3_moe", router_aux_loss_coef=0.1)
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in first.model.modules()]
    sft(tmp_path, first.model, peft_config=None, router_aux_loss_coef=0.1)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in first.model.modules()] == before
