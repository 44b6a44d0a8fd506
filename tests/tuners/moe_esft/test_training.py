"""Training with MOE_ESFT: what the optimiser sees and moves, checkpointing, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

from tests.families import build, inputs
from tests.tolerances import assert_gradient_close
from trl_moe_ext.experts.census.esft_checks import randomise_deltas
from trl_moe_ext.experts.census.selecting import changed_experts
from trl_moe_ext.experts.census.tensors import inputs as inputs_of
from trl_moe_ext.experts.census.tensors import output
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig, MoeEsftExperts

CHOSEN = [1, 2, 6]


def names_of_experts(model: nn.Module) -> list[str]:
    names = (name for name, module in model.named_modules() if isinstance(module, MoeEsftExperts))
    return [name.removeprefix("base_model.model.") for name in names]


def adapted(model_type: str, dtype: torch.dtype = torch.float32):
    """A model of whose experts three a layer are trained."""
    layers = names_of_experts(get_peft_model(build(model_type), MoeEsftConfig(expert_selection="all")))
    return get_peft_model(build(model_type, dtype), MoeEsftConfig(selected_experts=dict.fromkeys(layers, CHOSEN)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text", "dbrx", "jetmoe", "longcat_flash"])
def test_adamw_and_a_merge_change_the_chosen_experts_and_nothing_else(model_type, dtype):
    stock, model = build(model_type, dtype), adapted(model_type, dtype).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(3):
        output(model, inputs_of(stock, step)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    layers, merged = names_of_experts(model), model.merge_and_unload()
    changed = {name: changed_experts(stock.get_submodule(name), merged.get_submodule(name)) for name in layers}
    # An expert that no token came to has no gradient, and is not moved.
    assert all({*experts} <= {*CHOSEN} for experts in changed.values())
    assert any(changed.values())
    frozen = {n: p for n, p in stock.named_parameters() if not any(n.startswith(f"{layer}.") for layer in layers)}
    for name, parameter in frozen.items():
        torch.testing.assert_close(merged.get_parameter(name), parameter, rtol=0, atol=0)


def test_gradients_and_states_have_the_size_of_the_chosen_experts():
    """Nothing of the size of a stack is trained: neither a gradient nor a state of the optimiser."""
    model = adapted("qwen3_moe").train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(**inputs("qwen3_moe")).logits.square().mean().backward()
    optimizer.step()
    every = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts.base_layer." in n)
    chosen = every * len(CHOSEN) // 8
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == chosen
    assert sum(s.numel() for state in optimizer.state.values() for s in state.values() if s.ndim) == 2 * chosen


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    expected = gradients(adapted("qwen3_moe").train())
    model = adapted("qwen3_moe").train()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for name, gradient in gradients(model).items():
        assert_gradient_close(gradient, expected[name], torch.float32, name)


def gradients(model):
    randomise_deltas(model, "default", seed=3)
    model(**inputs("qwen3_moe"), labels=inputs("qwen3_moe")["input_ids"]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def test_under_a_checkpoint_saved_tensors_do_not_depend_on_the_routing():
    """Non-reentrant checkpointing raises if a recompute saves tensors of other shapes than the forward pass did."""
    layer = next(m for m in adapted("qwen3_moe").modules() if isinstance(m, MoeEsftExperts))
    x, w = torch.randn(9, 64, requires_grad=True), torch.rand(9, 2)
    spread = torch.rand(9, 8).topk(2, -1).indices
    together = torch.tensor([[0, 1]]).expand(9, 2)
    routing = iter([spread, together])
    out = torch.utils.checkpoint.checkpoint(lambda x: layer(x, next(routing), w), x, use_reentrant=False)
    out.sum().backward()
    assert next(routing, None) is None
    assert x.grad is not None


def test_autocast_runs_experts_in_their_own_dtype():
    model = adapted("qwen3_moe").eval()
    randomise_deltas(model, "default", seed=3)
    layer = next(m for m in model.modules() if isinstance(m, MoeEsftExperts))
    x, index, w = torch.randn(5, 64), torch.rand(5, 8).topk(2, -1).indices, torch.rand(5, 2)
    expected = layer(x, index, w)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, index, w), expected)
