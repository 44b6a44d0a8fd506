"""Run by torchrun: the steps of every case in each of two processes, kept in one file for each process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from tests.sft.runs import logged, rows, sft, train
from tests.torchrun import save_and_leave
from trl_moe_ext import MoeLoraConfig, MoeSFTTrainer
from trl_moe_ext.tuners.moe_lora import router_biases

# What each process does with its half of every step, of eight sequences in all.
CASES: dict[str, dict[str, Any]] = {
    "at once": {"data": rows(16), "per_device_train_batch_size": 4},
    "accumulated": {"data": rows(20), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"data": rows(16), "per_device_train_batch_size": 4, "gradient_checkpointing": True},
    "a bias that moves": {
        "data": rows(20),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "router_bias_update_rate": 0.125,
    },
}
WANTED = {
    "router_aux_loss_coef": 0.5,
    "router_losses": {"z_loss": 0.1, "drift_kl": 2.0},
    "router_metrics": "full",
}


class Unreduced(MoeSFTTrainer):
    """Each process goes by its own counts: what the comparison has to notice."""

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return 2 * tensor


def run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradients, and what was logged of the routers, step by step; and where their biases ended."""
    torch.manual_seed(0)
    has_bias = "router_bias_update_rate" in options
    adapter = MoeLoraConfig(r=4, router_mode="lora", router_bias=has_bias)
    trainer = sft(folder, peft_config=adapter, **WANTED, **options)
    losses, gradients = train(trainer)
    names = {key for row in trainer.state.log_history for key in row if key.startswith("router/")}
    return {
        "losses": losses,
        "gradients": gradients,
        "log": {name: logged(trainer, name) for name in names},
        "biases": router_biases(trainer.model) if has_bias else {},
        "processes": trainer.accelerator.num_processes,
    }


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    done = {name: run(folder / rank, options) for name, options in CASES.items()}
    done["unreduced"] = run(folder / rank, CASES["at once"] | {"trainer": Unreduced})
    save_and_leave(done, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
