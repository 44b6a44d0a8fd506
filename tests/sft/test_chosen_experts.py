"""Training of the experts that a profile chooses: the trainer with both tuners, and what a checkpoint must be of."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.families import build
from tests.sft.runs import joined, logged, losses, rows, sft, trained_weights
from trl_moe_ext import MoeEsftConfig, MoeLoraConfig
from trl_moe_ext.errors import AdapterFileError
from trl_moe_ext.profiles.measure import measure_profile
from trl_moe_ext.profiles.profile import ExpertProfile

# Two or three experts of a layer leave little to share.
pytestmark = pytest.mark.filterwarnings("ignore:expert_rank='by_share' gives all experts the same rank")
RUN = {"data": rows(20), "max_steps": 4, "learning_rate": 1e-2, "max_grad_norm": 1.0, "randomised": False}
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> ExpertProfile:
    """Of the tiny model on the data that it is trained on."""
    batch = joined(rows(20))
    return measure_profile(build("qwen3_moe"), [{name: batch[name] for name in ("input_ids", "attention_mask")}])


@pytest.fixture
def chosen(profile, tmp_path) -> dict[str, object]:
    """Options that choose three experts of each layer."""
    profile.save(tmp_path / "profile.json")
    return {"expert_selection": f"profile:{tmp_path / 'profile.json'}", "experts_per_layer": 3}


ADAPTERS = {
    "moe_esft": lambda chosen: MoeEsftConfig(**chosen, modules_to_save=["gate"]),
    "moe_lora": lambda chosen: MoeLoraConfig(**chosen, r=4, expert_rank="by_share", moe_target=["experts", "router"]),
}


def test_moe_esft_trains_the_weights_of_the_chosen_experts_and_watches_the_router(chosen, tmp_path):
    adapter = ADAPTERS["moe_esft"](chosen)
    trainer = sft(tmp_path / "run", peft_config=adapter, router_metrics="full", **RUN)
    frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    # At the first step the deltas are zero, and the routing is that of the base model.
    drift = logged(trainer, "router/drift_kl")
    assert drift[-1] > drift[0] >= 0
    assert logged(trainer, "router/max_vio")

    trainer.save_model()
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key in saved if ".experts." in key} == {"esft_delta", "esft_selected"}
    assert {len(tensor) for key, tensor in saved.items() if ".experts." in key} == {3}
    again = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path / "run").eval()
    batch = joined(rows(4))
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, trainer.model.eval()(**batch).logits)


def test_a_router_loss_steers_a_router_that_moe_esft_trains(chosen, tmp_path):
    options = RUN | {"router_aux_loss_coef": 0.5, "router_learning_rate": 2e-2}
    trainer = sft(tmp_path / "run", peft_config=ADAPTERS["moe_esft"](chosen), **options)
    trainer.train()
    rates = sorted(group["initial_lr"] for group in trainer.optimizer.param_groups)
    assert rates == [1e-2, 2e-2]
    assert {name.partition(".gate.")[2] for name in trained_weights(trainer.model) if ".gate." in name}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_resumed_run_is_the_uninterrupted_one(adapter, chosen, tmp_path):
    through = sft(tmp_path / "run", peft_config=ADAPTERS[adapter](chosen), **RUN, **CHECKPOINTS)
    through.train()
    weights = trained_weights(through.model)
    assert any(weight.any() for weight in weights.values())
    again = sft(tmp_path / "run", peft_config=ADAPTERS[adapter](chosen), **RUN, **CHECKPOINTS)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(again) == losses(through)
    assert all(torch.equal(weight, weights[name]) for name, weight in trained_weights(again.model).items())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_checkpoint_of_other_experts_is_refused(adapter, profile, chosen, tmp_path):
    """Of the same number, so that all shapes are those of the checkpoint."""
    options = RUN | CHECKPOINTS
    uniform = {"moe_esft": {}, "moe_lora": {"r": 4}}[adapter]
    config = {"moe_esft": MoeEsftConfig, "moe_lora": MoeLoraConfig}[adapter]
    sft(tmp_path / "run", peft_config=config(**chosen, **uniform), **options).train()
    layers = [use.experts[0] for use in profile.layers]
    others = {name: [0, 1, 2] for name in layers}
    first = sft(tmp_path / "other", peft_config=config(selected_experts=others, **uniform), **options)
    with pytest.raises(AdapterFileError, match=r"of other experts than the model trains: .*experts.* instead of"):
        first.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
