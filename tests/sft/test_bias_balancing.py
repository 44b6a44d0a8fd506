"""Balancing by a bias: it moves by the load of the whole step, is saved with the adapter, and is no silent option."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from tests.sft.runs import sft
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.trace import RouterTrace
from trl_moe_ext.sft.bias_balancing import BiasBalancing
from trl_moe_ext.tuners.moe_lora import router_biases

RATE = 0.125  # exact in float32


def run(folder, model="qwen3_moe", **options):
    """A finished run, and what each router chose in its forward passes: label -> one list of choices a pass."""
    biased = MoeLoraConfig(r=2, router_bias=True)
    trainer = sft(folder, model, peft_config=biased, randomised=False, router_bias_update_rate=RATE, **options)
    chosen = {}

    def observe(routing):
        kept = routing.kept if routing.kept is not None else slice(None)
        chosen.setdefault(routing.router.label, []).append(routing.top_k_index[kept])

    step = trainer.training_step

    def watched(model, inputs, *args):
        with RouterTrace(find_routers(trainer.model), observe) as trace:
            trace.kept = inputs["attention_mask"].bool()
            return step(model, inputs, *args)

    trainer.training_step = watched
    trainer.train()
    return trainer, chosen


def expected(passes, micro_batches, num_experts):
    """The bias by the rule of the paper, from the choices of every step."""
    bias = [0.0] * num_experts
    for start in range(0, len(passes), micro_batches):
        counts = [0] * num_experts
        for choice in passes[start : start + micro_batches]:
            for expert in choice.flatten().tolist():
                counts[expert] += 1
        mean = sum(counts) / num_experts
        bias = [b + RATE * ((count < mean) - (count > mean)) for b, count in zip(bias, counts, strict=True)]
    return torch.tensor(bias)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("model", ["qwen3_moe", "deepseek_v3"])
def test_the_bias_moves_by_the_load_of_each_step(tmp_path, model, micro_batches):
    trainer, chosen = run(tmp_path, model, gradient_accumulation_steps=micro_batches)
    biases = router_biases(trainer.model)
    assert biases.keys() == chosen.keys()
    assert any(bias.any() for bias in biases.values())
    for label, bias in biases.items():
        assert torch.equal(bias, expected(chosen[label], micro_batches, len(bias)))


def test_the_biases_are_saved_with_the_adapter(tmp_path):
    trainer, _ = run(tmp_path)
    trainer.save_model(str(tmp_path / "adapter"))
    saved = [
        tensor
        for key, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
        if "bias" in key
    ]
    assert len(saved) == len(router_biases(trainer.model))
    for tensor, bias in zip(saved, router_biases(trainer.model).values(), strict=True):
        assert torch.equal(tensor, bias)


def test_without_metrics_the_bias_moves_the_same(tmp_path):
    first, _ = run(tmp_path / "off", router_metrics="off")
    second, _ = run(tmp_path / "full", router_metrics="full")
    for one, other in zip(*(router_biases(t.model).values() for t in (first, second)), strict=True):
        assert torch.equal(one, other)


def test_an_adapter_without_biases_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="router_bias_update_rate has no effect: the adapter has no biases"):
        sft(tmp_path, peft_config=MoeLoraConfig(r=2), router_bias_update_rate=RATE)


def test_biases_that_nothing_moves_are_a_warning(tmp_path):
    with pytest.warns(RuntimeWarning, match="router_bias=True has no effect without router_bias_update_rate"):
        sft(tmp_path, peft_config=MoeLoraConfig(r=2, router_bias=True), randomised=False, router_metrics="summary")


def test_a_checkpoint_without_biases_is_told():
    """As FSDP writes them: nothing that no gradient reaches."""
    biases = {"layers.0.mlp.gate": torch.zeros(4)}
    balancing = BiasBalancing(lambda: biases, dict, 0.1)
    balancing.on_train_begin(None, TrainerState(), None)
    with pytest.warns(RuntimeWarning, match="though 2 steps are done"):
        balancing.on_train_begin(None, TrainerState(global_step=2), None)
    biases["layers.0.mlp.gate"] += 0.1
    balancing.on_train_begin(None, TrainerState(global_step=2), None)
