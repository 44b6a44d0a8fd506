"""A real language model: SmolLM2-135M, made a mixture of experts and fine-tuned with the stock `trl` script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real_model import smollm2_gguf

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def run(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_upcycled_smollm2_learns(tmp_path):
    gguf = smollm2_gguf()
    moe, adapter = tmp_path / "moe", tmp_path / "adapter"
    run(BIN / "trl-moe", "upcycle", gguf.parent, moe, "--gguf-file", gguf.name, "--num-experts", 4, "--top-k", 2)
    printed = run(
        *(BIN / "trl", "sft", "--model_name_or_path", moe, "--dataset_name", "configs/quickstart/data"),
        *("--peft_type", "moe_lora", "--lora_r", 8, "--moe_expert_r", 4, "--learning_rate", 1e-3, "--max_steps", 8),
        *(
            "--per_device_train_batch_size",
            4,
            "--logging_steps",
            1,
            "--max_length",
            64,
            "--gradient_checkpointing",
            False,
        ),
        *("--output_dir", adapter, "--save_steps", 8, "--report_to", "none", "--bf16", False, "--seed", 3),
    )
    assert "routed experts" in printed
    state = json.loads((adapter / "checkpoint-8" / "trainer_state.json").read_text())
    losses = [row["loss"] for row in state["log_history"] if "loss" in row]
    assert losses[-1] < 0.7 * losses[0]
    answer = run(BIN / "trl-moe", "ask", adapter, "--max-new-tokens", 12, "What comes after April?")
    assert "Base model:" in answer
    assert "Adapter:" in answer
