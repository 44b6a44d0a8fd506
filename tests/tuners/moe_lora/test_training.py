"""Training: checkpointing, autocast, compile, and what the optimiser sees."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from tests.families import build, inputs, randomise_factors
from tests.tolerances import assert_gradient_close, assert_output_close
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts

BATCH = inputs("qwen3_moe") | {"labels": inputs("qwen3_moe")["input_ids"]}


def adapted(**options):
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3, **options))
    randomise_factors(model)
    return model.train()


def gradients(model):
    torch.manual_seed(5)
    loss = model(**BATCH).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(actual, expected):
    for name, gradient in expected.items():
        assert_gradient_close(actual[name], gradient, torch.float32, name)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, lora_dropout):
    """With dropout the recompute must draw the same masks."""
    expected_loss, expected = gradients(adapted(lora_dropout=lora_dropout))
    model = adapted(lora_dropout=lora_dropout)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    loss, actual = gradients(model)
    torch.testing.assert_close(loss, expected_loss)
    assert_same_gradients(actual, expected)


def test_saved_tensors_do_not_depend_on_the_routing():
    """Non-reentrant checkpointing raises if a recompute saves tensors of other shapes than the forward pass did."""
    layer = next(m for m in adapted().modules() if isinstance(m, MoeLoraExperts))
    x, w = torch.randn(9, 64, requires_grad=True), torch.rand(9, 2)

    def saved(index):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append((t.shape, t.dtype)) or t, lambda t: t):
            layer(x, index, w)
        return shapes

    spread = torch.rand(9, 8).topk(2, -1).indices
    assert saved(spread) == saved(torch.tensor([[0, 1]]).expand(9, 2))


def test_every_factor_learns():
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3, lora_dropout=0.05)).train()
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(6):
        loss = model(**BATCH).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert not torch.equal(p, before[name]), f"{name} was not trained"


def test_a_float32_model_trains_under_autocast():
    """How numbers change is a matter of the kernel's own test: here routing itself may differ in bfloat16."""
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, actual = gradients(model)
    assert loss.isfinite()
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in actual.values())


def test_bfloat16_base_with_float32_factors():
    """PEFT's default `autocast_adapter_dtype` on a bfloat16 model."""
    model = get_peft_model(build("qwen3_moe", torch.bfloat16), MoeLoraConfig(r=3)).train()
    randomise_factors(model)
    assert next(p for n, p in model.named_parameters() if "experts.lora_A" in n).dtype == torch.float32
    _, actual = gradients(model)
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in actual.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_experts_forward_compiles_without_a_graph_break(dtype):
    layer = next(m for m in adapted().modules() if isinstance(m, MoeLoraExperts)).to(dtype)
    x, w, index = torch.randn(9, 64).to(dtype), torch.rand(9, 2).to(dtype), torch.rand(9, 8).topk(2, -1).indices
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_output_close(compiled(x, index, w), layer(x, index, w), dtype)
    compiled(x, index, w).sum().backward()
    assert layer.lora_A["default"].gate_up_proj.grad is not None


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_a_whole_model_compiles_without_a_graph_break(model_type):
    model = get_peft_model(build(model_type), MoeLoraConfig(r=3, lora_dropout=0.1)).eval()
    randomise_factors(model)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    batch = inputs(model_type)
    assert_output_close(compiled(**batch).logits, model(**batch).logits, torch.float32)
    compiled.train()(**batch).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
