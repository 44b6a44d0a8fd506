"""Short runs of a trainer on tiny models, with the loss and the gradients of every step kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback
from trl import SFTTrainer

from tests.families import build, randomise_factors
from trl_moe_ext import MoeLoraConfig, MoeSFTConfig, MoeSFTTrainer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
TOKENIZER = AutoTokenizer.from_pretrained(QUICKSTART / "model")
PAD = TOKENIZER.pad_token_id

Batch = dict[str, Tensor]


def rows(count: int = 8) -> list[list[int]]:
    """Sequences of token ids of very different lengths, so that micro-batches differ in their padding."""
    generator = torch.Generator().manual_seed(5)
    lengths = [(7, 15, 4, 9, 12, 3, 8, 10)[i % 8] + i // 8 for i in range(count)]
    return [torch.randint(16, 80, (length,), generator=generator).tolist() for length in lengths]


def joined(sequences: list[list[int]]) -> Batch:
    """One batch of all sequences, padded on the right."""
    width = max(map(len, sequences))
    tokens = torch.tensor([ids + [PAD] * (width - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Options of a run that changes no weight and logs every step."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "router_metrics": "off",
        "seed": 1,
    } | options


def sft(
    folder: Path,
    model: str | nn.Module = "qwen3_moe",
    *,
    peft_config: Any = "default",
    data: Any = None,
    randomised: bool = True,
    trainer: type[SFTTrainer] = MoeSFTTrainer,
    config: type[Any] = MoeSFTConfig,
    others: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer for a tiny model, with every factor of its adapter random.

    Args:
        folder: of its output.
        model: or its type; "quickstart" is the model of the quickstart, whose vocabulary is that of the tokenizer.
        peft_config: LoRA on experts, attention and router if "default".
        data: token ids of each sequence, or a dataset.
        randomised: whether the factors are; new ones of PEFT change nothing yet.
        trainer: its class.
        config: class of its options.
        others: arguments of the trainer.
        options: of its config.
    """
    if peft_config == "default":
        peft_config = MoeLoraConfig(r=4, moe_target=["experts", "attention", "router"])
    made = trainer(
        model=_built(model) if isinstance(model, str) else model,
        args=config(**settings(folder, **options)),
        train_dataset=data
        if isinstance(data, Dataset | IterableDataset)
        else Dataset.from_dict({"input_ids": data or rows()}),
        processing_class=TOKENIZER,
        peft_config=peft_config,
        **(others or {}),
    )
    if randomised:
        randomise_factors(made.model)
    return made


def _built(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "model") if name == "quickstart" else build(name)


class _Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self) -> None:
        self.steps: list[Batch] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.steps.append(gradients(model))


def gradients(model: nn.Module) -> Batch:
    """Name -> gradient of what is trained and has one."""
    found = model.named_parameters()
    return {name: p.grad.detach().clone() for name, p in found if p.requires_grad and p.grad is not None}


def train(trainer: Any) -> tuple[list[float], list[Batch]]:
    """The logged loss and the gradients of every step."""
    kept = _Gradients()
    trainer.add_callback(kept)
    trainer.train()
    return losses(trainer), kept.steps


def losses(trainer: Any) -> list[float]:
    """The logged loss of every step."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def logged(trainer: Any, key: str) -> list[float]:
    """The values of a key in the log."""
    return [row[key] for row in trainer.state.log_history if key in row]


def trained_weights(model: PreTrainedModel) -> Batch:
    """Name -> weight of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
