"""TRL's fused output layer gives the model's own log-probabilities, also where the model has no body apart from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput
from trl.trainer import utils

from tests.families import randomise_factors
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import HostVersionError
from trl_moe_ext.experts.census import build, inputs
from trl_moe_ext.hosts.trl_fused_head import complete_fused_head

# llama4 has no body apart from the model, the others no `num_experts`; qwen3_moe has all that TRL asks for.
TYPES = ("llama4_text", "llama4", "glm4v_moe", "phimoe", "granitemoe", "qwen3_moe")


def adapted(model_type: str, **overrides: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model = build(model_type, **overrides)
    arguments = inputs(model)
    model = get_peft_model(model, MoeLoraConfig(r=4))
    randomise_factors(model)
    return model, arguments | {"attention_mask": torch.ones_like(arguments["input_ids"])}


def label_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)


def fused(model: nn.Module, arguments: dict[str, Tensor], **options: Any) -> Any:
    return model(**arguments, labels=arguments["input_ids"], fused_lm_head=True, **options)


def factor_gradients(model: nn.Module, log_probs: Tensor) -> list[Tensor]:
    return torch.autograd.grad(log_probs.mean(), [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("model_type", TYPES)
def test_log_probabilities_and_gradients_are_the_models_own(model_type: str) -> None:
    model, arguments = adapted(model_type)
    expected = label_log_probs(model(**arguments).logits, arguments["input_ids"])
    utils.add_fused_lm_head(model.get_base_model())
    out = fused(model, arguments, output_router_logits=True)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert 0 < out.aux_loss < torch.inf
    gradients = factor_gradients(model, out.log_probs)
    for found, own in zip(gradients, factor_gradients(model, expected), strict=True):
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)


def test_images_go_through() -> None:
    # The projector reads four patches of 64 values at once, and calls their number the intermediate size.
    model, arguments = adapted("llama4", vision_config={"intermediate_size": 256})
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2 // 4
    arguments["input_ids"][:, 2 : 2 + patches] = model.config.image_token_id
    shape = (2, vision.num_channels, vision.image_size, vision.image_size)
    blank = arguments | {"pixel_values": torch.zeros(shape)}
    arguments["pixel_values"] = torch.randn(shape)
    expected = label_log_probs(model(**arguments).logits, arguments["input_ids"])
    utils.add_fused_lm_head(model.get_base_model())
    torch.testing.assert_close(fused(model, arguments).log_probs, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fused(model, blank).log_probs, expected, atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_moe"])
def test_without_labels_the_forward_is_the_models_own(model_type: str) -> None:
    model, arguments = adapted(model_type)
    expected = model(**arguments).logits
    utils.add_fused_lm_head(model.get_base_model())
    fused(model, arguments)
    assert torch.equal(model(**arguments).logits, expected)
    model.generation_config.pad_token_id = 0
    assert model.generate(**arguments, max_new_tokens=2, do_sample=False).shape == (2, 14)


def test_the_output_layer_is_whole_after_an_error() -> None:
    model, arguments = adapted("llama4_text")
    expected = model(**arguments).logits
    utils.add_fused_lm_head(model.get_base_model())
    with pytest.raises(ValueError, match="exactly one of"):
        fused(model, arguments, inputs_embeds=torch.zeros(2, 12, 64))
    assert torch.equal(model(**arguments).logits, expected)


def test_other_adapters_get_what_trl_gives() -> None:
    model = get_peft_model(build("llama4_text"), LoraConfig(target_modules=["q_proj"]))
    utils.add_fused_lm_head(model.get_base_model())
    assert model.get_base_model().forward.__self__ is model.get_base_model()
    assert not hasattr(model.config, "num_experts")
    with pytest.raises(AttributeError, match="last_hidden_state"):
        fused(model, inputs(model.get_base_model()))


def test_logits_that_are_not_what_the_output_layer_returned_are_refused() -> None:
    """Log-probabilities of something else would train the model on a wrong loss."""
    model = build("llama4_text")
    forward = model.forward

    def padded(*args: Any, **kwargs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=nn.functional.pad(forward(*args, **kwargs).logits, (0, 1)))

    arguments = inputs(model)
    utils.add_fused_lm_head(model)
    complete_fused_head(model, padded)
    with pytest.raises(HostVersionError, match="65 values a token instead of 64"):
        fused(model, arguments)
