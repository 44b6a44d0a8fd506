"""`trl sft` in a process of its own: options reach our trainer, and TRL's own trains without them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.hosts.processes import run
from tests.sft.runs import QUICKSTART
from trl_moe_ext.router.history import HISTORY_FILE

TRL = str(Path(sys.executable).with_name("trl"))


def sft(folder, *options):
    """What a run of two steps has logged, step by step."""
    command = [
        TRL,
        "sft",
        "--model_name_or_path",
        str(QUICKSTART / "model"),
        "--dataset_name",
        str(QUICKSTART / "data"),
    ]
    done = run(
        [
            *command,
            *("--use_cpu", "--bf16", "false", "--output_dir", str(folder), "--report_to", "none"),
            *("--max_steps", "2", "--logging_steps", "1", "--save_steps", "2", "--per_device_train_batch_size", "2"),
            *options,
        ],
        folder.parent,
    )
    assert done.returncode == 0, done.stderr
    log = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    return [row for row in log if "loss" in row]


@pytest.mark.slow
def test_options_reach_the_trainer(tmp_path):
    losses = '{"z_loss": 0.001}'
    rows = sft(
        tmp_path / "out",
        *("--peft_type", "moe_lora", "--router_mode", "full", "--router_aux_loss_coef", "0.01"),
        *("--router_losses", losses, "--router_metrics", "full", "--gradient_accumulation_steps", "2"),
    )
    for row in rows:
        assert row["router/loss/load_balancing"] == pytest.approx(0.01 * row["router/aux_loss"])
        assert row["router/loss/z_loss"] > 0
        assert "router/drift_kl/3" in row
    assert (tmp_path / "out" / HISTORY_FILE).exists()
    assert (tmp_path / "out" / "router_heatmap.png").exists()


@pytest.mark.slow
def test_without_our_adapter_there_is_nothing_of_ours(tmp_path):
    adapter = ("--use_peft", "--lora_target_modules", "q_proj", "v_proj")
    rows = sft(tmp_path / "out", *adapter, "--router_aux_loss_coef", "0.01")
    assert all("aux_loss" in row for row in rows), "TRL's own loss"
    assert not [key for row in rows for key in row if "router" in key]
    assert not (tmp_path / "out" / HISTORY_FILE).exists()
