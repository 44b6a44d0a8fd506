"""`MoeSFTTrainer` in the place of `SFTTrainer`, on whatever that takes; `SFTTrainer` with our adapter as it was."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from tests.families import build
from tests.sft.runs import TOKENIZER, logged, rows, settings, sft, train, trained_weights
from trl_moe_ext import MoeLoraConfig, MoeSFTConfig, MoeSFTTrainer
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.sft.config import ROUTER_OPTIONS

ASKED = [
    {"router_aux_loss_coef": 0.1},
    {"router_losses": {"z_loss": 0.1}},
    {"router_losses": {"drift_kl": 0.1}},
    {"router_learning_rate": 0.1},
]


def plain(**options):
    """An `SFTConfig` of a run."""
    return SFTConfig(**{name: value for name, value in options.items() if name not in ROUTER_OPTIONS})


def dense():
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def test_with_trl_options(tmp_path):
    """They have no word on metrics: the default is a summary."""
    trainer = sft(tmp_path, config=plain, router_aux_loss_coef=0.1)
    assert type(trainer.args) is SFTConfig
    trainer.train()
    assert logged(trainer, "router/aux_loss")
    assert logged(trainer, "router/loss/load_balancing")


def test_with_no_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's own defaults want bfloat16, and transformers a GPU for that.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    data = Dataset.from_dict({"input_ids": rows()})
    trainer = MoeSFTTrainer(build("qwen3_moe"), None, train_dataset=data, processing_class=TOKENIZER)
    assert type(trainer.args) is SFTConfig
    assert trainer._session is not None


def test_with_arguments_by_position(tmp_path):
    data = Dataset.from_dict({"input_ids": rows()})
    args = MoeSFTConfig(**settings(tmp_path, router_aux_loss_coef=0.1))
    trainer = MoeSFTTrainer(build("qwen3_moe"), args, None, data, None, TOKENIZER)
    assert trainer.processing_class is TOKENIZER
    assert trainer._session.objective.names == ["load_balancing"]


def test_a_dense_model(tmp_path):
    trainer = sft(tmp_path, dense(), peft_config=LoraConfig(), randomised=False, router_metrics="full")
    trainer.train()
    assert trainer._session is None
    assert not [key for row in trainer.state.log_history for key in row if "router" in key]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: next(iter(asked)))
def test_a_dense_model_has_nothing_to_steer(tmp_path, asked):
    with pytest.raises(ConfigError, match=r"router_.*: no effect, because the model has no router. Leave it out"):
        sft(tmp_path, dense(), peft_config=LoraConfig(), randomised=False, **asked)


def test_a_model_with_its_adapter_already(tmp_path):
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=4))
    trainer = sft(tmp_path, model, peft_config=None, router_aux_loss_coef=0.1, router_metrics="full")
    trainer.train()
    assert all(value > 0 for value in logged(trainer, "router/drift_kl"))


def test_adapters_of_peft(tmp_path):
    trainer = sft(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]), router_metrics="full")
    trainer.train()
    assert logged(trainer, "router/topk_overlap/1")


@pytest.mark.parametrize("adapter", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_that_are_learned(tmp_path, adapter):
    """They add tokens: without them the base model sees others, so there is no drift to be told."""
    prompts = adapter(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = sft(tmp_path, peft_config=prompts, randomised=False, router_metrics="full", router_aux_loss_coef=0.1)
    trainer.train()
    assert logged(trainer, "router/max_vio")
    assert not logged(trainer, "router/drift_kl")


def test_a_whole_model_is_trained(tmp_path):
    run = {"max_steps": 1, "router_metrics": "full"}
    trainer = sft(tmp_path, peft_config=None, randomised=False, router_aux_loss_coef=0.5, **run)
    (loss,), (gradients,) = train(trainer)
    (value,) = logged(trainer, "router/aux_loss")
    other = sft(tmp_path, peft_config=None, randomised=False, router_aux_loss_coef=0.0, **run)
    (less,), (before,) = train(other)
    assert loss - less == pytest.approx(0.5 * value, rel=1e-5)
    assert gradients.keys() == before.keys()
    assert any("gate.weight" in name for name in gradients)
    assert not logged(trainer, "router/drift_kl")


def test_a_whole_model_has_no_base_to_stay_near(tmp_path):
    with pytest.raises(ConfigError, match=r"drift_kl: .* the model has none that can be switched off"):
        sft(tmp_path, peft_config=None, randomised=False, router_losses={"drift_kl": 0.1})


def test_trl_with_our_adapter_is_as_it_was(tmp_path):
    """The same weights as ours with nothing asked for, and not a word about routers."""
    weights = []
    for trainer_class, config in ((SFTTrainer, plain), (MoeSFTTrainer, MoeSFTConfig)):
        adapter = MoeLoraConfig(r=4, lora_dropout=0.1)
        run = {"learning_rate": 1e-2, "router_aux_loss_coef": 0.0}
        trainer = sft(tmp_path, peft_config=adapter, trainer=trainer_class, config=config, **run)
        trainer.train()
        weights.append(trained_weights(trainer.model))
        assert not [key for row in trainer.state.log_history for key in row if "router" in key]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_second_run_of_the_same_trainer(tmp_path):
    """As in a notebook: steps start again, and so does the history."""
    trainer = sft(tmp_path, router_metrics="summary")
    trainer.train()
    trainer.train()
    assert [record.step for record in trainer._artefacts._history.records] == [1, 2, 3, 4]


def test_a_second_trainer_for_the_same_model(tmp_path):
    first = sft(tmp_path, router_aux_loss_coef=0.1, router_metrics="summary")
    first.train()
    second = sft(tmp_path, first.model, peft_config=None, router_aux_loss_coef=0.1, router_metrics="summary")
    second.train()
    assert logged(second, "router/aux_loss") == pytest.approx(logged(first, "router/aux_loss"))


def test_a_loss_outside_of_the_training_loop(tmp_path):
    """A batch that no step was announced for is a step of its own, each time."""
    trainer = sft(tmp_path, router_aux_loss_coef=0.5)
    trainer.model.train()
    batches = [trainer.data_collator([trainer.train_dataset[i] for i in range(4)]) for _ in range(2)]
    first, second = (trainer.compute_loss(trainer.model, batch) for batch in batches)
    assert first.item() == second.item()
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batches[0]).item() == pytest.approx(first.item())
