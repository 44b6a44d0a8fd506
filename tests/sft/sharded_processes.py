"""Run by torchrun: short fine-tunes with accelerate's FSDP2 in each of two processes, kept in one file for each."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.distributed.tensor import DTensor

from tests.sft.runs import TOKENIZER, losses, rows, settings
from tests.torchrun import save_and_leave
from trl_moe_ext import MoeEsftConfig, MoeLoraConfig, MoeSFTConfig, MoeSFTTrainer
from trl_moe_ext.tuners.selection.indices import SelectedIndices


class Case(NamedTuple):
    """A run: the type of its model, its adapter for a choice of experts, and options of its own."""

    model: str
    adapter: Callable[[dict[str, Any]], Any]
    options: Mapping[str, Any] = MappingProxyType({})


# Some experts of a module with a rank of their own: their factors are kept, and their indices named, by rank.
_RANKS = {"layers.0.mlp.experts.1": 2, "layers.1.mlp.experts.0": 7, "layers.1.mlp.experts.3": 2}
CASES = {
    "chosen experts": Case("qwen3_moe", lambda chosen: MoeLoraConfig(r=4, **chosen)),
    "ranks of experts": Case("qwen3_moe", lambda chosen: MoeLoraConfig(r=4, rank_pattern=_RANKS)),
    "moe_esft": Case("qwen3_moe", lambda chosen: MoeEsftConfig(**chosen)),
    "deepseek_v3": Case("deepseek_v3", lambda chosen: MoeLoraConfig(r=4)),
    "glm4_moe": Case("glm4_moe", lambda chosen: MoeLoraConfig(r=4)),
    "a bias that moves": Case(
        "qwen3_moe",
        lambda chosen: MoeLoraConfig(r=4, router_bias=True, **chosen),
        {"router_bias_update_rate": 0.125},
    ),
}
# Those that also go on from a checkpoint.
RESUMED = ("chosen experts", "moe_esft", "deepseek_v3")


def allow_cpus() -> None:
    """accelerate 1.15 turns to FSDP only where it finds a GPU; FSDP2 itself runs with gloo as well."""
    initialise = AcceleratorState.__init__

    @functools.wraps(initialise)
    def on_cpus(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = on_cpus


def trainer_of(case: str, inputs: Path, output: Path, batch: int, **options: Any) -> MoeSFTTrainer:
    """The trainer of a case, whose model it loads itself: in the first process only, under FSDP2.

    Args:
        case: its name.
        inputs: with `profile.json` and a folder for each model.
        output: of the run.
        batch: sequences of a step in each process.
        options: of the run.
    """
    chosen = {"expert_selection": f"profile:{inputs / 'profile.json'}", "experts_per_layer": 3}
    run = {"max_steps": 4, "learning_rate": 1e-2, "max_grad_norm": 1.0, "model_init_kwargs": {"dtype": "float32"}}
    torch.manual_seed(0)
    return MoeSFTTrainer(
        model=str(inputs / CASES[case].model),
        args=MoeSFTConfig(
            **settings(output, **run, per_device_train_batch_size=batch, **CASES[case].options, **options)
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows(32)}),
        processing_class=TOKENIZER,
        peft_config=CASES[case].adapter(chosen),
    )


def run(
    case: str, inputs: Path, output: Path, batch: int, resume: str | None = None, **options: Any
) -> dict[str, Any]:
    """What a run shows, and its adapter in `output`."""
    trainer = trainer_of(case, inputs, output, batch, **options)
    trainer.train(resume_from_checkpoint=resume)
    state = trainer.model.state_dict()
    indices = {name: part for name, part in trainer.model.named_modules() if isinstance(part, SelectedIndices)}
    trainer.save_model()
    return {
        "losses": losses(trainer),
        "processes": trainer.accelerator.num_processes,
        "sharded": sum(isinstance(kept, DTensor) for kept in state.values()),
        "buffers": {name: kept.cpu() for name, kept in state.items() if not isinstance(kept, DTensor)},
        "differences": {name: part.differences() for name, part in indices.items()},
    }


def main(folder: Path) -> None:
    allow_cpus()
    checkpoints = {"batch": 4, "save_strategy": "steps", "save_steps": 2}
    seen: dict[str, Any] = {case: run(case, folder, folder / "two" / case, **checkpoints) for case in CASES}
    seen["resumed"] = {
        case: run(case, folder, folder / "resumed" / case, resume=str(folder / "two" / case / "checkpoint-2"), batch=4)
        for case in RESUMED
    }
    save_and_leave(seen, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
