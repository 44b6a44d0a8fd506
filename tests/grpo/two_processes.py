"""Run by torchrun: a short run in each of two processes, and what each of them saw: ``FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from peft import get_peft_model_state_dict

from tests.grpo.trainer_runs import make_trainer
from tests.torchrun import save_and_leave


def run(folder: Path, batch_size: int) -> dict[str, object]:
    """Three steps of two prompts each, of samples that are in order and never stale."""
    trainer = make_trainer(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=1,
        max_staleness=0,
        reward_concurrency=1,
        # Adam would make much of the roundings of gradients that are almost zero.
        optim="sgd",
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    return {
        "weights": {name: tensor.clone() for name, tensor in get_peft_model_state_dict(trainer.model).items()},
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "ess": [row["importance/ess"] for row in trainer.state.log_history if "importance/ess" in row],
        "version": trainer.model_version,
        "processes": trainer.accelerator.num_processes,
    }


def main(folder: Path) -> None:
    # One folder: only the main process writes into it.
    save_and_leave(run(folder / "run", 4), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
