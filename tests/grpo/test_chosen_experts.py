"""Adapters of chosen experts travel: what the generator computes with is what the trainer trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.grpo.backends.local_runs import LOG_PROB_ATOL, ask, collect, context, log_probs, save_model, snapshot
from tests.grpo.fakes import FakeBackend
from tests.grpo.trainer_runs import MODEL, PROMPTS, draw, make_trainer, reward, settings
from trl_moe_ext import AsyncMoeGRPOTrainer, MoeEsftConfig, MoeLoraConfig
from trl_moe_ext.errors import AdapterFileError, ConfigError
from trl_moe_ext.grpo import trainer as trainer_module
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.local.backend import LocalBackend
from trl_moe_ext.grpo.backends.local.model import AdaptedModel
from trl_moe_ext.grpo.backends.local.options import setup_of
from trl_moe_ext.grpo.backends.vllm.backend import VllmBackend
from trl_moe_ext.profiles.measure import measure_profile
from trl_moe_ext.router.routers import find_routers

# Two or three experts of a layer leave little to share.
pytestmark = pytest.mark.filterwarnings("ignore:expert_rank='by_share' gives all experts the same rank")
TOKENS = torch.tensor([[5, 9, 2, 7, 11, 4, 6, 3]])
KINDS = ["moe_esft", "moe_lora"]
BY_SHARE = {"expert_rank": "by_share"}


def made(kind: str, **options: Any) -> PeftConfig:
    if kind == "moe_esft":
        return MoeEsftConfig(moe_target=["experts", "attention"], **options)
    return MoeLoraConfig(r=4, **options)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def profiled(path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options that choose two experts of each layer."""
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    measure_profile(loaded(path), [{"input_ids": TOKENS}]).save(file)
    return {"expert_selection": f"profile:{file}", "experts_per_layer": 2}


def loaded(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def trained(path: str, config: PeftConfig) -> PeftModel:
    """What the trainer has: nothing of the adapter is zero."""
    model = get_peft_model(loaded(path), config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def generating(path: str, config: PeftConfig, folder: Path) -> AdaptedModel:
    return AdaptedModel(setup_of(context(path, folder, peft_config=config), 0, max_requests=1, longest_prompt=8))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "ranks"), [("moe_esft", {}), ("moe_lora", {}), ("moe_lora", BY_SHARE)])
def test_the_generator_computes_with_what_travelled(
    kind: str, ranks: dict[str, str], path: str, profiled: dict[str, Any], tmp_path: Path
) -> None:
    config = made(kind, **profiled, **ranks)
    trainer = trained(path, config)
    sent = snapshot(trainer)
    arrived = AdapterSnapshot.from_payload(0, sent.payload, sent.checksum)
    generator = generating(path, config, tmp_path)
    before = logits(generator.language_model)
    generator.put(arrived)
    found, expected = logits(generator.language_model), logits(trainer)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.parametrize(("kind", "ranks"), [("moe_esft", {}), ("moe_lora", {}), ("moe_lora", BY_SHARE)])
def test_a_generator_that_is_started_later_needs_no_profile(
    kind: str, ranks: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = tmp_path / "profile.json"
    measure_profile(loaded(str(MODEL)), [{"input_ids": TOKENS}]).save(profile)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(trainer_module, "make_backend", lambda args, **context: asked.update(context) or FakeBackend())
    config = made(kind, expert_selection=f"profile:{profile}", experts_per_layer=2, **ranks)
    trainer = AsyncMoeGRPOTrainer(str(MODEL), reward, settings(tmp_path), PROMPTS, peft_config=config)
    profile.unlink()
    generator = generating(asked["model_path"], asked["peft_config"], tmp_path)
    generator.put(snapshot(trainer.model))  # which refuses other experts, and other ranks


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_other_experts_are_refused(kind: str, path: str, tmp_path: Path) -> None:
    """Their shapes are the same."""
    layers = [router.experts for router in find_routers(loaded(path))]
    one, other = (made(kind, selected_experts=dict.fromkeys(layers, experts)) for experts in ([0, 1], [0, 2]))
    with pytest.raises(AdapterFileError, match=r"of other experts than the model .*\[0, 1\] instead of \[0, 2\]"):
        generating(path, other, tmp_path).put(snapshot(trained(path, one)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run(kind: str, tmp_path: Path) -> None:
    """Of the trainer, with a generator in memory."""
    backend = FakeBackend(complete=draw)
    options = {"expert_selection": "all"} if kind == "moe_esft" else {}
    trainer = make_trainer(tmp_path, backend, learning_rate=1e-2, peft_config=made(kind, **options))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 3
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    prefix = {"moe_esft": ".esft_delta.", "moe_lora": ".lora_"}[kind]
    assert all(prefix in name for name in changed)
    newest = trainer.rollout_worker._snapshot
    assert any(tensor.any() for name, tensor in newest.tensors.items() if "experts" in name)


def test_the_local_generator_draws_with_an_adapter_of_moe_esft(
    path: str, profiled: dict[str, Any], tmp_path: Path
) -> None:
    config = made("moe_esft", **profiled)
    trainer = trained(path, config)
    backend = LocalBackend(context(path, tmp_path, peft_config=config))
    backend.start(snapshot(trainer))
    try:
        asked = ask(backend)
        for generation in collect(backend, len(asked)):
            expected = log_probs(trainer, asked[generation.id], generation.token_ids)
            torch.testing.assert_close(torch.tensor(generation.log_probs), expected, rtol=0, atol=LOG_PROB_ATOL)
    finally:
        backend.stop()


def test_vllm_is_refused_with_the_way_out(path: str, profiled: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MoeEsftConfig, which is no LoRA: use LoRA or moe_lora, or merge"):
        VllmBackend(context(path, tmp_path, peft_config=made("moe_esft", **profiled), rollout_backend="vllm"))
