"""The quickstart as a user runs it: the stock `trl` script, from the repository root, without a network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent

pytestmark = [
    pytest.mark.slow,
    # Where a test runs from is where the relative paths of the recipe start.
    pytest.mark.usefixtures("_at_the_root"),
]


@pytest.fixture
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def trl_sft(output_dir: Path, *options: str) -> str:
    """Run the recipe for 24 steps, saving after 12; the whole of what it printed."""
    command = [Path(sys.executable).with_name("trl"), "sft", "--config", "configs/quickstart/sft.yaml"]
    short = ["--max_steps", "24", "--save_steps", "12", "--eval_steps", "12", "--output_dir", output_dir]
    done = subprocess.run(
        [*map(str, command + short), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def history(output_dir: Path) -> list[dict[str, float]]:
    return json.loads((output_dir / "checkpoint-24" / "trainer_state.json").read_text())["log_history"]


def test_it_trains_saves_resumes_and_reloads(tmp_path):
    through, again = tmp_path / "through", tmp_path / "again"
    printed = trl_sft(through)
    for promised in ("routed experts", "Loss curve:", "Adapter:", "trl-moe ask"):
        assert promised in printed
    assert (through / "loss_curve.png").stat().st_size > 5_000
    losses = [row["eval_loss"] for row in history(through) if "eval_loss" in row]
    assert losses[-1] < 0.5 * losses[0]

    trl_sft(again, "--resume_from_checkpoint", str(through / "checkpoint-12"))
    # A resumed run evaluates once more at its start; from there on the two are one run.
    assert [row["eval_loss"] for row in history(again) if "eval_loss" in row][-1] == losses[-1]
    expected, actual = (load_file(run / "adapter_model.safetensors") for run in (through, again))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)

    tokens = torch.arange(20).unsqueeze(0) + 5
    with torch.no_grad():
        first, second = (
            AutoPeftModelForCausalLM.from_pretrained(run).eval()(tokens).logits for run in (through, again)
        )
        base = AutoPeftModelForCausalLM.from_pretrained(through).unload()(tokens).logits
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert (first - base).abs().max() > 0.1


def test_under_torchrun(tmp_path):
    """A launcher starts the script itself: nobody imports this package for it."""
    import trl.scripts.sft

    command = [Path(sys.executable).with_name("torchrun"), "--nproc_per_node", "1", trl.scripts.sft.__file__]
    options = ["--config", "configs/quickstart/sft.yaml", "--max_steps", "1", "--output_dir", tmp_path]
    done = subprocess.run([*map(str, command + options), "--use_cpu", "true"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOE_LORA"
