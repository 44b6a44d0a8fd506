"""Async GRPO on the bundled model: a trainer, samples made by hand, and micro-batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.grpo.fakes import FakeBackend
from trl_moe_ext import AsyncMoeGRPOConfig, AsyncMoeGRPOTrainer, MoeLoraConfig
from trl_moe_ext.grpo.backends.protocol import Generation, GenerationRequest, RolloutBackend, Segment
from trl_moe_ext.grpo.batches.packing import RolloutCollator
from trl_moe_ext.grpo.sample import MoeRolloutSample, SampleMetrics
from trl_moe_ext.grpo.trl_async import TreeRow
from trl_moe_ext.router.record import RoutingRecord

MODEL = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
TEMPERATURE = 0.7
PROMPTS = Dataset.from_dict({"prompt": [f"what is {number}" for number in range(10)]})

# What the hosts say of a tiny run on a CPU.
HOSTS_NOTES = (
    "ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
)


def settings(folder: Path, **options: Any) -> AsyncMoeGRPOConfig:
    """Two prompts a step, in two micro-batches; nothing is trained or written unless asked for."""
    return AsyncMoeGRPOConfig(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_generations": 4,
            "max_completion_length": 8,
            "temperature": TEMPERATURE,
            "max_steps": 3,
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            "router_aux_loss_coef": 0.0,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_staleness": 1,
            **options,
        }
    )


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Differs between the completions of a group."""
    return [float(ids[0] % 7) + ids[-1] / 100 for ids in completion_ids]


def draw(request: GenerationRequest, asked_version: int, version: int) -> Generation:
    """Five tokens that follow from the request, of a policy that finds them as likely as any."""
    tokens = tuple(20 + (request.seed >> 5 * at) % 26 for at in range(5))
    return Generation(request.id, tokens, (-7.0,) * 5, (Segment(asked_version, 5),))


def make_trainer(folder: Path, backend: RolloutBackend | None = None, **options: Any) -> AsyncMoeGRPOTrainer:
    """With low-rank factors that are not zero, so that the adapter matters."""
    known = {"peft_config", "reward_funcs", "train_dataset", "callbacks"} & options.keys()
    arguments = {name: options.pop(name) for name in known}
    return AsyncMoeGRPOTrainer(
        str(MODEL),
        args=settings(folder, **options),
        rollout_backend=backend or FakeBackend(complete=draw),
        **{"peft_config": MoeLoraConfig(r=2), "reward_funcs": reward, "train_dataset": PROMPTS, **arguments},
    )


def reference_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model without an adapter, with the attention of transformers."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, attn_implementation="eager").eval()


def make_sample(
    prompt: Sequence[int],
    completion: Sequence[int],
    log_probs: Sequence[float],
    advantage: float = 1.0,
    group_id: int = 0,
    routes: RoutingRecord | None = None,
) -> MoeRolloutSample:
    """One completion."""
    metrics = SampleMetrics(reward=advantage)
    sample = MoeRolloutSample(
        prompt=[],
        completion=[],
        input_ids=np.array([*prompt, *completion]),
        completion_mask=np.array([0] * len(prompt) + [1] * len(completion)),
        old_log_probs=np.array([0.0] * len(prompt) + [*log_probs], dtype=np.float32),
        advantage=advantage,
        model_version=0,
        group_id=group_id,
        metrics=metrics,
        segments=(Segment(0, len(completion)),),
        routes=routes,
    )
    metrics.sample = sample
    return sample


def entry(sample: MoeRolloutSample) -> dict[str, Any]:
    """What TRL's packing takes of a sample."""
    names = ("input_ids", "completion_mask", "old_log_probs", "advantage", "group_id", "metrics")
    return {name: getattr(sample, name) for name in names}


def packed(trainer: AsyncMoeGRPOTrainer, samples: Sequence[MoeRolloutSample]) -> dict[str, Tensor]:
    """A micro-batch of one row, as the trainer's own collator makes it."""
    row = TreeRow()
    for sample in samples:
        row.add(entry(sample))
    collate = RolloutCollator(
        trainer.processing_class.pad_token_id,
        slots=trainer._step_replay.slots,
        needs_routes=trainer.args.routing_replay,
        metrics=trainer._metrics["train"],
    )
    return collate([[row]])


def step(trainer: AsyncMoeGRPOTrainer, *micro_batches: Sequence[MoeRolloutSample]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of a step."""
    trainer.current_gradient_accumulation_steps = len(micro_batches)
    trainer.model.zero_grad()
    loss = sum(trainer.training_step(trainer.model, packed(trainer, samples)).item() for samples in micro_batches)
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad and p.grad is not None}
    return loss, {name: gradient.detach().clone() for name, gradient in found.items()}
