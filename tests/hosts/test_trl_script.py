"""The stock scripts in processes of their own: errors before anything is launched, flags in every child."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import transformers.trainer
from torch import nn
from trl import ModelConfig, TrlParser
from trl.scripts import sft

from tests.hosts.processes import run, run_python
from trl_moe_ext.hosts.trl import add_run_summary, training_script
from trl_moe_ext.reporting.callback import RunSummaryCallback
from trl_moe_ext.reporting.record_callback import RunRecordCallback

TRL = str(Path(sys.executable).with_name("trl"))
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]


@pytest.fixture
def default_callbacks(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """transformers' list of default callbacks, to be changed freely."""
    callbacks = list(transformers.trainer.DEFAULT_CALLBACKS)
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", callbacks)
    return callbacks


def test_trl_command_refuses_before_it_launches(tmp_path: Path) -> None:
    done = run([TRL, "sft", "--use_cpu", "--output_dir", "out", "--peft_type", "moe_lra"], tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "trl sft: error: --peft_type moe_lra is unknown; did you mean moe_lora?"
    assert "usage:" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "accelerate" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_flags_and_yaml_reach_the_process_that_accelerate_launches(tmp_path: Path) -> None:
    """The child gets as far as its data set, of which there is none: it would refuse options that it does not know."""
    (tmp_path / "config.yaml").write_text("peft_type: moe_lora\nuse_cpu: true\noutput_dir: out\n")
    done = run([TRL, "dpo", "--config", "config.yaml", "--moe_expert_r", "2"], tmp_path)
    assert done.returncode == 1
    assert "ValueError: Either `datasets` or `dataset_name` must be provided." in done.stderr
    assert "trl_moe_ext leaves" not in done.stderr


def test_mistakes_that_show_with_the_model_are_told_in_one_line(tmp_path: Path) -> None:
    options = [
        "--model_name_or_path",
        str(QUICKSTART / "model"),
        "--dataset_name",
        str(QUICKSTART / "data"),
        "--use_cpu",
    ]
    options += ["--bf16", "false", "--output_dir", "out", "--peft_type", "moe_lora"]
    done = run([sys.executable, "-m", "trl.scripts.sft", *options, "--moe_target", "shared_experts"], tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("trl sft: error: nothing to adapt: --moe_target=")
    assert not (tmp_path / "out").exists()


def test_torchrun(tmp_path: Path) -> None:
    done = run([*TORCHRUN, "-m", "trl.scripts.sft", "--use_cpu", "--moe_expert_r", "2"], tmp_path)
    assert "trl sft: error: --moe_expert_r: no effect, because --peft_type is not given" in done.stderr
    assert "usage:" not in done.stderr


# Runs each script as `__main__` up to its data set, or its teacher; `trl` is imported once.
ALL_SCRIPTS = """
import runpy, sys, transformers.trainer
from trl_moe_ext.reporting.callback import RunSummaryCallback
from trl_moe_ext.reporting.record_callback import RunRecordCallback
stock = list(transformers.trainer.DEFAULT_CALLBACKS)
def run(command, *arguments):
    sys.argv = [command, "--use_cpu", "--output_dir", "out", *arguments]
    try:
        runpy.run_module(f"trl.scripts.{command}", run_name="__main__", alter_sys=True)
    except ValueError as error:
        assert "must be provided" in str(error) or "teacher model is required" in str(error), error
    else:
        raise AssertionError(f"{command} ran through")
    return transformers.trainer.DEFAULT_CALLBACKS
for command in ["distillation", "dpo", "grpo", "kto", "reward", "rloo", "sft"]:
    assert run(command, "--use_peft") == run(command, "--peft_type", "lora") == stock, command
    assert run(command, "--peft_type", "moe_lora") == [*stock, RunRecordCallback, RunSummaryCallback], command
    esft = ["--peft_type", "moe_esft", "--moe_expert_selection", "all"]
    assert run(command, *esft) == [*stock, RunRecordCallback, RunSummaryCallback], command
    del transformers.trainer.DEFAULT_CALLBACKS[-2:]
"""


def test_every_script_gets_the_summary_for_our_adapters_only(tmp_path: Path) -> None:
    run_python(ALL_SCRIPTS, tmp_path)


def test_nobody_elses_session_gets_the_summary(default_callbacks: list[type]) -> None:
    before = list(default_callbacks)
    assert training_script() is None
    (parsed,) = TrlParser((ModelConfig,)).parse_args_and_config(["--peft_type", "moe_lora"])
    assert parsed.peft_type == "moe_lora"
    assert default_callbacks == before


def test_the_trainer_of_a_script_has_the_summary(
    default_callbacks: list[type], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert sft.__file__
    monkeypatch.setattr(sys.modules["__main__"], "__file__", sft.__file__)
    assert training_script() == "sft"
    add_run_summary()
    add_run_summary()
    assert default_callbacks.count(RunSummaryCallback) == default_callbacks.count(RunRecordCallback) == 1
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = transformers.Trainer(nn.Linear(2, 2), arguments)
    assert [type(callback) for callback in trainer.callback_handler.callbacks].count(RunSummaryCallback) == 1


def test_without_the_list_of_callbacks_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", sft.__file__)
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", ())
    with pytest.warns(RuntimeWarning, match=r"transformers \d.*DEFAULT_CALLBACKS is not a list.*without a summary"):
        add_run_summary()
