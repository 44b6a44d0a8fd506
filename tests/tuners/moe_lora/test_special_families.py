"""Blocks that are exchanged, weights that are shared, routers that are read: nothing is left behind or doubled."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import get_peft_model

from tests.families import build, inputs, randomise_factors
from tests.tolerances import assert_output_close, relative_error
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts import census


def adapted(model_type, **options):
    model = get_peft_model(build(model_type), MoeLoraConfig(r=3, **options)).eval()
    randomise_factors(model)
    return model


def output(model, model_type):
    torch.manual_seed(0)
    with torch.no_grad():
        return census.output(model, inputs(model_type))


def blocks(model):
    return [module for module in model.modules() if type(module).__name__.endswith("Llama4TextMoe")]


def test_the_block_of_llama4_is_exchanged_while_its_experts_are_adapted():
    model = adapted("llama4_text")
    assert {type(block).__name__ for block in blocks(model)} == {"SparseLlama4TextMoe"}
    assert {type(block).__name__ for block in blocks(model.unload())} == {"Llama4TextMoe"}


def test_llama4_without_its_adapter_is_the_stock_model():
    model = adapted("llama4_text")
    with model.disable_adapter():
        assert_output_close(output(model, "llama4_text"), output(build("llama4_text"), "llama4_text"), torch.float32)


@pytest.mark.parametrize("is_hooked_first", [True, False])
def test_the_block_of_llama4_under_hooks_of_accelerate(is_hooked_first):
    """As a model has them that is spread over several devices."""
    expected = output(adapted("llama4_text"), "llama4_text")
    base = build("llama4_text")
    for block in blocks(base) if is_hooked_first else ():
        add_hook_to_module(block, ModelHook())
    model = get_peft_model(base, MoeLoraConfig(r=3)).eval()
    randomise_factors(model)
    for block in () if is_hooked_first else blocks(model):
        add_hook_to_module(block, ModelHook())
    assert_output_close(output(model, "llama4_text"), expected, torch.float32)
    assert_output_close(output(model.merge_and_unload(), "llama4_text"), expected, torch.float32)


def test_a_refusal_leaves_the_model_as_it_was():
    model = build("llama4_text")
    last = blocks(model)[-1]
    last.forward = lambda hidden_states: hidden_states
    with pytest.raises(LayoutError, match="only be adapted inside an unchanged Llama4TextMoe"):
        get_peft_model(model, MoeLoraConfig())
    assert not [name for name, _ in model.named_parameters() if "lora_" in name or "base_layer" in name]
    assert {type(block).__name__ for block in blocks(model)} == {"Llama4TextMoe"}


def test_a_copy_of_an_adapted_llama4_is_its_own():
    model = adapted("llama4_text")
    expected = output(model, "llama4_text")
    twin = copy.deepcopy(model)
    model.unload()
    assert torch.equal(output(twin, "llama4_text"), expected)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_modules_that_share_their_weights_are_adapted_together(side):
    q_proj = [name for name, _ in build("diffusion_gemma").named_modules() if name.endswith("q_proj") and side in name]
    q_proj = [name for name in q_proj if "vision" not in name]
    model = adapted("diffusion_gemma", moe_target=["attention"], target_modules=q_proj)
    expected = output(model, "diffusion_gemma")
    assert_output_close(output(model.merge_and_unload(), "diffusion_gemma"), expected, torch.float32)


def test_a_second_adapter_of_shared_weights_has_factors_of_its_own():
    model = adapted("diffusion_gemma")
    expected = output(model, "diffusion_gemma")
    model.add_adapter("second", MoeLoraConfig(r=2))
    count = {a: sum(f".{a}." in name for name, _ in model.named_parameters()) for a in ("default", "second")}
    assert count["default"] == count["second"] > 0
    assert torch.equal(output(model, "diffusion_gemma"), expected)


def test_a_router_that_is_read_forgets_a_merged_adapter_when_it_is_disabled():
    """The reference policy of DPO and GRPO is the model with its adapter disabled."""
    base = output(build("longcat_flash"), "longcat_flash")
    model = adapted("longcat_flash", moe_target=["router"])
    assert relative_error(output(model, "longcat_flash"), base) > 1e-3
    model.merge_adapter()
    with model.disable_adapter():
        assert_output_close(output(model, "longcat_flash"), base, torch.float32)
