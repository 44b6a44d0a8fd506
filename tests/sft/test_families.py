"""Families on which TRL's own auxiliary loss fails or is nothing: here it is added, and trained."""

from __future__ import annotations

import pytest
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.families import FAMILIES
from tests.sft.added import assert_added
from tests.sft.runs import sft
from trl_moe_ext import MoeLoraConfig

# Without an output layer, or not for text that is made token by token: no `SFTTrainer` takes them.
NOT_CAUSAL = {
    "deepseek_ocr2_text",
    "diffusion_gemma_text",
    "dots3_note_vision_encoder",
    "ernie4_5_vl_moe_text",
    "glm4v_moe_text",
    "glm5_next_text",
    "mistral_large4_text",
    "muse_spark_text",
    "nllb-moe",
    "openai_privacy_filter",
    "qwen3_omni_moe_talker_text",
    "qwen3_omni_moe_text",
    "qwen3_vl_moe_text",
    "step3p5",
    "switch_transformers",
    "unlimited_ocr_text",
    "vitpose_backbone",
}
NAMED = ["deepseek_v3", "gemma4_text", "gpt_oss", "granitemoe", "llama4_text", "phimoe"]


@pytest.mark.parametrize("model_type", NAMED)
def test_a_router_loss_is_added(tmp_path, model_type):
    assert_added(tmp_path, model=model_type, peft_config=MoeLoraConfig(r=4), reached="lora")


def stock_config(router_metrics, **options):
    return SFTConfig(**options)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "granitemoe", "phimoe"])
def test_trl_alone_still_fails(tmp_path, model_type):
    """Or this would be about nothing."""
    adapter = LoraConfig(target_modules=["o_proj"])
    trainer = sft(
        tmp_path,
        model_type,
        peft_config=adapter,
        trainer=SFTTrainer,
        config=stock_config,
        router_aux_loss_coef=0.1,
    )
    with pytest.raises(AttributeError, match="num_experts"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted({*FAMILIES} - NOT_CAUSAL))
def test_a_router_loss_is_added_in_any_family(tmp_path, model_type):
    """With the router trained."""
    adapter = MoeLoraConfig(r=4, moe_target=["experts", "router"])
    assert_added(tmp_path, model=model_type, peft_config=adapter, reached="lora")
