"""A local generator for a tiny model, and the trainer's model to compare it with."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.families import build, randomise_factors
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.local.backend import LocalBackend
from trl_moe_ext.grpo.backends.protocol import BackendContext, Generation, GenerationRequest, Sampling
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.travelling import adapter_tensors

PEFT = MoeLoraConfig(r=4, moe_target=["experts", "attention", "router"])
# Largest distance of log-probabilities that the generator and the trainer compute with the same float32 weights, one
# token by token over a cache, the other all at once. Sums of another order: among 155 completions of 100 tokens the
# largest was 1.05e-5, the next 5e-6, which is five roundings at the size of 8 that these numbers have.
LOG_PROB_ATOL = 3e-5

PROMPTS = [(5, 9, 2, 7), (3, 3, 8), (11, 4, 6, 2, 9, 1, 7), (12,)]


def save_model(folder: Path) -> str:
    """A tiny Qwen3-MoE, in float32."""
    torch.manual_seed(0)
    build("qwen3_moe").float().save_pretrained(folder)
    return str(folder)


def trainer_model(path: str, peft_config: Any = PEFT) -> PeftModel:
    """What the trainer trains: its factors are random, not zero."""
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = get_peft_model(base, deepcopy(peft_config)).eval()  # PEFT notes the model in its config
    randomise_factors(model)
    return model


def snapshot(model: PeftModel, version: int = 0) -> AdapterSnapshot:
    return AdapterSnapshot(version, adapter_tensors(model, "default"))


def zero_snapshot(model: PeftModel, version: int = 0) -> AdapterSnapshot:
    """Of an adapter that changes nothing."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in adapter_tensors(model, "default").items()}
    return AdapterSnapshot(version, tensors)


def context(path: str, folder: Path, **options: Any) -> BackendContext:
    """Options of the sampling, of the context and of the run, by name."""
    sampling = {"max_completion_length": 12, "eos_token_ids": ()}
    sampling |= {name: options.pop(name) for name in Sampling.__dataclass_fields__ if name in options}
    own = {name: options.pop(name) for name in ("record_routes", "peft_config") if name in options}
    settings = {"max_inflight_tasks": 8, "rollout_num_threads": 1, "bf16": False, "use_cpu": True}
    settings |= {"report_to": "none", "activation_checkpointing": False}
    args = AsyncMoeGRPOConfig(output_dir=str(folder), **(settings | options))
    return BackendContext(
        model_path=path,
        model_init_kwargs={"dtype": "float32"},
        peft_config=own.pop("peft_config", PEFT),
        sampling=Sampling(**sampling),
        args=args,
        output_dir=str(folder),
        **own,
    )


def ask(backend: LocalBackend, count: int = 8, prompts: list[tuple[int, ...]] = PROMPTS) -> dict[str, tuple[int, ...]]:
    """Submit requests; id -> prompt."""
    asked = {f"0/0/{i}": prompts[i % len(prompts)] for i in range(count)}
    backend.submit([GenerationRequest(id, prompt, seed=i) for i, (id, prompt) in enumerate(asked.items())])
    return asked


def collect(backend: LocalBackend, count: int, seconds: float = 60.0) -> list[Generation]:
    """So many completions, in the order of their ids."""
    found: list[Generation] = []
    end = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        found += backend.collect(1.0)
    assert len(found) == count
    return sorted(found, key=lambda generation: generation.id)


@torch.no_grad()
def log_probs(model: PeftModel, prompt: tuple[int, ...], tokens: tuple[int, ...], temperature: float = 1.0) -> Tensor:
    """Those that the trainer's model gives the tokens of a completion, in one forward."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


@dataclass
class Alive:
    """Whether a process runs, zombies not counted."""

    pid: int

    def __bool__(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def ends(self, seconds: float) -> bool:
        """Whether it is gone in so many seconds."""
        end = time.monotonic() + seconds
        while self and time.monotonic() < end:
            time.sleep(0.05)
        return not self
