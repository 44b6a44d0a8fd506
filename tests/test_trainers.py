"""TRL's trainers with a `MoeLoraConfig` and nothing else of ours: they train the experts, save and resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from tests.families import randomise_factors
from trl_moe_ext import MoeLoraConfig

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart"
MODEL = str(QUICKSTART / "model")

# The hosts' own deprecations and notes on a tiny CPU run.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


PROMPTS = [user(text) for text in ("an owl hoots", "a seal sleeps", "a crab hides", "a gull calls")]
PAIRS = {
    "prompt": PROMPTS,
    "chosen": [assistant(f"An owl hoots {n} times.") for n in range(4)],
    "rejected": [assistant(f"No owl, not {n} of them.") for n in range(4)],
}


def common(tmp_path, **options):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "seed": 1,
    } | options


def train_and_check(trainer, *args, **kwargs):
    """Every factor of the experts moved."""
    before = {n: p.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("experts.lora_A" in name for name in before)
    trainer.train(*args, **kwargs)
    moved = {n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert {n for n in before if "experts.lora_B" in n} <= moved
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def sft(tmp_path, **options):
    return SFTTrainer(
        model=MODEL,
        args=SFTConfig(**common(tmp_path, max_length=64, **options)),
        train_dataset=load_dataset(str(QUICKSTART / "data"), split="train[:32]"),
        peft_config=MoeLoraConfig(r=4, lora_dropout=0.05),
    )


def test_sft_learns(tmp_path):
    losses = train_and_check(sft(tmp_path, max_steps=6, learning_rate=5e-3))
    assert losses[-1] < losses[0]


def test_sft_resumes_to_the_same_weights_as_an_uninterrupted_run(tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    through = sft(tmp_path / "through", **options)
    through.train()
    again = sft(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    expected, actual = (
        load_file(tmp_path / run / "checkpoint-4" / "adapter_model.safetensors") for run in ("through", "again")
    )
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)


def test_dpo_starts_from_a_loaded_adapter_with_itself_as_the_reference(tmp_path):
    """TRL copies the adapter for the reference by its parameter names: with unknown names it would stay unset."""
    first = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), MoeLoraConfig(r=4))
    randomise_factors(first)
    first.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    trainer = DPOTrainer(
        model=PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True),
        args=DPOConfig(**common(tmp_path / "dpo", max_length=64)),
        train_dataset=Dataset.from_dict(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(MODEL),
    )
    train_and_check(trainer)
    # Policy and reference agree before the first step, to the last bit.
    assert trainer.state.log_history[0]["rewards/chosen"] == 0
    assert trainer.state.log_history[0]["rewards/rejected"] == 0


@pytest.mark.slow
def test_kto(tmp_path):
    rows = {"prompt": PROMPTS, "completion": PAIRS["chosen"], "label": [True, False, True, False]}
    trainer = KTOTrainer(
        model=MODEL,
        args=KTOConfig(**common(tmp_path, max_length=64)),
        train_dataset=Dataset.from_dict(rows),
        peft_config=MoeLoraConfig(r=4),
    )
    train_and_check(trainer)


@pytest.mark.slow
def test_reward(tmp_path):
    rows = {side: [p + c for p, c in zip(PROMPTS, PAIRS[side], strict=True)] for side in ("chosen", "rejected")}
    trainer = RewardTrainer(
        model=MODEL,
        args=RewardConfig(**common(tmp_path, max_length=64)),
        train_dataset=Dataset.from_dict(rows),
        peft_config=MoeLoraConfig(r=4, task_type="SEQ_CLS"),
    )
    train_and_check(trainer)


@pytest.mark.slow
@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_online_trainers(tmp_path, trainer_class, config_class):
    def reward(completions, **kwargs):
        return [float(len(completion[0]["content"])) for completion in completions]

    trainer = trainer_class(
        model=MODEL,
        reward_funcs=reward,
        args=config_class(**common(tmp_path, num_generations=2, max_completion_length=12, beta=0.05, temperature=1.5)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=MoeLoraConfig(r=4),
    )
    train_and_check(trainer)


@pytest.mark.slow
def test_distillation(tmp_path):
    trainer = DistillationTrainer(
        model=MODEL,
        teacher_model=MODEL,
        args=DistillationConfig(**common(tmp_path, max_completion_length=8)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=MoeLoraConfig(r=4, init_lora_weights=False),
    )
    train_and_check(trainer)
