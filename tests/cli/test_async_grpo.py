"""`trl-moe async-grpo`: options, rewards and data by name, what a run is made of, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from peft import LoraConfig
from trl.rewards import think_format_reward
from typer.testing import CliRunner, Result

from trl_moe_ext.cli import async_grpo as command
from trl_moe_ext.cli.main import app
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.rollout.supervisor import RolloutError
from trl_moe_ext.grpo.trl_async import AsyncGRPOConfig
from trl_moe_ext.reporting.callback import RunSummaryCallback
from trl_moe_ext.reporting.record_callback import RunRecordCallback
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig
from trl_moe_ext.tuners.moe_lora import MoeLoraConfig

ROOT = Path(__file__).parents[2]
CPU = ["--use_cpu", "true", "--bf16", "false", "--output_dir", "out", "--model_name_or_path", "model"]
COMPLETE = [*CPU, "--peft_type", "moe_lora", "--dataset_name", "data", "--reward_funcs", "my_rewards.one"]
REWARDS = """
def one(completions, **others):
    return [1.0] * len(completions)
def two(completions, **others):
    return [2.0] * len(completions)
LIMIT = 3
"""

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


class StubTrainer:
    """Takes what the trainer takes, and ends as it is told to."""

    made: dict[str, Any]
    called: list[Any]
    ends_with: BaseException | None = None

    def __init__(self, **arguments: Any) -> None:
        type(self).made = arguments

    def train(self, resume_from_checkpoint: Any) -> None:
        self.called.append(("train", resume_from_checkpoint))
        if self.ends_with is not None:
            raise self.ends_with

    def save_model(self, folder: str) -> None:
        self.called.append(("save_model", folder))

    def push_to_hub(self, dataset_name: str) -> None:
        self.called.append(("push_to_hub", dataset_name))

    def end(self) -> None:
        self.called.append(("end",))


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[StubTrainer]:
    """A stub in the place of the trainer, in a folder with data and rewards."""
    stub = type("Stub", (StubTrainer,), {"called": [], "made": {}})
    monkeypatch.setattr(command, "_trainer_class", lambda: stub)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in [name for name in sys.modules if name.startswith("my_rewards")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "data" / "test.jsonl").write_text('{"prompt": "c"}\n')
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    yield stub
    sys.modules.pop("my_rewards", None)


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["async-grpo", *words])


def done(*words: str) -> Result:
    result = run(*words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def error_of(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 2, (result.output, result.exception)
    # Data that is found is loaded with a progress bar.
    *_, last = [line for line in result.stderr.splitlines() if "examples" not in line]
    assert last.startswith("trl-moe: error: ")
    assert "usage:" not in result.stderr
    return last


# -- what a run is made of --------------------------------------------------------------------------------------------


def test_a_run_from_flags(trainer: type[StubTrainer]) -> None:
    done(*COMPLETE, "--lora_r", "4", "--moe_target", "experts", "--max_staleness", "2", "--dtype", "bfloat16")
    made = trainer.made
    assert made["model"] == "model"
    assert [function.__name__ for function in made["reward_funcs"]] == ["one"]
    assert made["reward_funcs"][0]([None, None]) == [1.0, 1.0]
    assert made["train_dataset"]["prompt"] == ["a", "b"]
    assert isinstance(made["peft_config"], MoeLoraConfig)
    assert (made["peft_config"].r, made["peft_config"].moe_target) == (4, ["experts"])
    assert isinstance(made["args"], AsyncMoeGRPOConfig)
    assert (made["args"].max_staleness, made["args"].dtype) == (2, "bfloat16")
    assert {type(callback) for callback in made["callbacks"]} == {RunRecordCallback, RunSummaryCallback}
    assert trainer.called == [("train", None), ("save_model", "out"), ("end",)]


def test_a_run_with_moe_esft(trainer: type[StubTrainer]) -> None:
    words = ["moe_esft" if word == "moe_lora" else word for word in COMPLETE]
    done(*words, "--moe_expert_selection", "all", "--moe_target", "experts", "attention")
    config = trainer.made["peft_config"]
    assert isinstance(config, MoeEsftConfig)
    assert (config.expert_selection, config.moe_target) == ("all", ["experts", "attention"])
    assert "--moe_expert_selection is not given" in error_of(*words)


def test_a_run_from_yaml_where_flags_come_first_and_env_is_set(
    trainer: type[StubTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLOUR_OF_THE_SEA", raising=False)
    settings = {
        "model_name_or_path": "model",
        "use_cpu": True,
        "bf16": False,
        "peft_type": "moe_lora",
        "dataset_name": "data",
        "dataset_train_split": "test",
        "reward_funcs": ["my_rewards.two", "think_format_reward"],
        "reward_weights": [1.0, 0.5],
        "transformers_continuous_batching_config": {"num_blocks": 7},
        "num_generations": 4,
        "model_revision": "tagged",
        "output_dir": "from-yaml",
        "env": {"COLOUR_OF_THE_SEA": "green"},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(settings))
    done("--config", "recipe.yaml", "--num_generations", "8", "--output_dir", "from-flag")
    args = trainer.made["args"]
    assert (args.num_generations, args.output_dir, args.reward_weights) == (8, "from-flag", [1.0, 0.5])
    assert args.transformers_continuous_batching_config == {"num_blocks": 7}
    assert args.model_init_kwargs == {"revision": "tagged"}
    assert trainer.made["reward_funcs"][1] is think_format_reward
    assert trainer.made["reward_funcs"][0].__name__ == "two"
    assert trainer.made["train_dataset"]["prompt"] == ["c"]
    assert os.environ.pop("COLOUR_OF_THE_SEA") == "green"


def test_a_mixture_of_datasets(trainer: type[StubTrainer]) -> None:
    settings = {"datasets": [{"path": "data", "split": "train"}, {"path": "data", "split": "test"}]}
    Path("recipe.yaml").write_text(yaml.safe_dump(settings))
    words = [word for word in COMPLETE if word not in ("--dataset_name", "data")]
    done("--config", "recipe.yaml", *words)
    assert trainer.made["train_dataset"]["prompt"] == ["a", "b", "c"]


def test_stock_lora_when_it_is_asked_for(trainer: type[StubTrainer]) -> None:
    words = [word for word in COMPLETE if word not in ("--peft_type", "moe_lora")]
    done(*words, "--use_peft", "--lora_target_modules", "q_proj", "v_proj")
    assert type(trainer.made["peft_config"]) is LoraConfig


def test_the_punishment_of_overlong_answers_is_made_before_it_is_used(trainer: type[StubTrainer]) -> None:
    done(*COMPLETE, "--reward_funcs", "get_soft_overlong_punishment")
    assert trainer.made["reward_funcs"][0](completion_ids=[[0] * 10, [0] * 2000]) == [0.0, -1.0]


def test_pushing_to_the_hub_comes_after_saving(trainer: type[StubTrainer]) -> None:
    done(*COMPLETE, "--push_to_hub", "true")
    assert [call[0] for call in trainer.called] == ["train", "save_model", "push_to_hub", "end"]


@pytest.mark.parametrize(("given", "meant"), [("true", True), ("True", True), ("false", None), ("data", "data")])
def test_where_to_resume(trainer: type[StubTrainer], given: str, meant: Any) -> None:
    done(*COMPLETE, "--resume_from_checkpoint", given)
    assert trainer.called[0] == ("train", meant)


def test_resuming_in_yaml(trainer: type[StubTrainer]) -> None:
    Path("recipe.yaml").write_text("resume_from_checkpoint: true\n")
    done("--config", "recipe.yaml", *COMPLETE)
    assert trainer.called[0] == ("train", True)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", ""], "--model_name_or_path is not given"),
        (["--max_stalness", "3"], "--max_stalness is unknown; did you mean --max_staleness"),
        (["--qqqq", "3"], "--qqqq is unknown; `trl-moe async-grpo --help` lists all options"),
        (["--use_transformers_continuous_batching"], "--use_transformers_continuous_batching is unknown"),
        (["--lora_r", "2", "stray"], "'stray' belongs to no option"),
        (["--max_staleness", "few"], "argument --max_staleness/--max-staleness: invalid int value: 'few'"),
        (["--max_staleness", "-1"], "max_staleness=-1 should be 0 or more"),
        (["--peft_type", "moe_lra"], "--peft_type moe_lra is unknown; did you mean moe_lora?"),
        (["--moe_target", "expert"], "expert"),
        (["--config", "nix.yaml"], "--config nix.yaml cannot be read: No such file"),
        (["--attn_implementation", "sdpa"], "--attn_implementation sdpa: no effect"),
        (["--load_in_4bit"], "--load_in_4bit, --load_in_8bit: the generator"),
        (["--eval_strategy", "steps", "--eval_steps", "5"], "--eval_strategy steps: there is no evaluation"),
        (["--resume_from_checkpoint", "nix"], "--resume_from_checkpoint nix is not a directory"),
        (["--dataset_name", "nix"], "--dataset_name nix cannot be loaded"),
        (["--dataset_train_split", "tran"], "--dataset_train_split tran: the dataset has no such split; did you mean"),
        (["--reward_funcs", "acuracy_reward"], "--reward_funcs acuracy_reward: did you mean accuracy_reward"),
        (["--reward_funcs", "my_rewards.on"], "my_rewards has no on; did you mean one"),
        (["--reward_funcs", "my_reward.one"], "there is no module my_reward, neither installed nor in"),
        (["--reward_funcs", "my_rewards.LIMIT"], "--reward_funcs my_rewards.LIMIT is of type int; name a function"),
        (["--reward_funcs", ".one"], "--reward_funcs .one is not a dotted path"),
    ],
)
def test_mistakes_are_one_line(trainer: type[StubTrainer], words: list[str], message: str) -> None:
    assert message in error_of(*COMPLETE, *words)
    assert trainer.made == {}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("--peft_type", "--peft_type is not given, and only an adapter travels to the generator; add --peft_type"),
        ("--dataset_name", "--dataset_name is not given"),
        ("--reward_funcs", "--reward_funcs is not given; add accuracy_reward"),
    ],
)
def test_what_has_to_be_given(trainer: type[StubTrainer], missing: str, message: str) -> None:
    place = COMPLETE.index(missing)
    assert message in error_of(*COMPLETE[:place], *COMPLETE[place + 2 :])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stalness: 3\n", "--max_stalness is unknown; did you mean --max_staleness"),
        ("moe_expert_ranks: 3\n", "--moe_expert_ranks is unknown"),
        ("a: [1\n", "--config is not YAML"),
    ],
)
def test_mistakes_in_yaml(trainer: type[StubTrainer], text: str, message: str) -> None:
    Path("recipe.yaml").write_text(text)
    assert message in error_of("--config", "recipe.yaml", *COMPLETE)


def test_a_bug_in_a_module_of_rewards_is_told_as_it_is(trainer: type[StubTrainer]) -> None:
    Path("my_rewards_2.py").write_text("import a_package_that_nobody_has\n")
    result = run(*COMPLETE, "--reward_funcs", "my_rewards_2.one")
    assert isinstance(result.exception, ModuleNotFoundError)


# -- how it ends ------------------------------------------------------------------------------------------------------


def write_checkpoint(step: int) -> Path:
    folder = Path("out") / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "rollout_state.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("end", "exit_code"),
    [
        (KeyboardInterrupt(), 128 + signal.SIGINT),
        (SystemExit(128 + signal.SIGTERM), 128 + signal.SIGTERM),
        (RolloutError("generation has ended"), 1),
    ],
    ids=["Ctrl-C", "SIGTERM", "generator"],
)
def test_an_interrupted_run_tells_how_it_goes_on(
    trainer: type[StubTrainer], end: BaseException, exit_code: int
) -> None:
    trainer.ends_with = end
    result = run(*COMPLETE, "--resume-from-checkpoint=data", "--run_name", "a b")
    assert result.exit_code == exit_code
    assert "There is no checkpoint yet" in result.stderr
    folder = write_checkpoint(7)
    result = run(*COMPLETE, "--resume_from_checkpoint", "data", "--run_name", "a b")
    assert result.exit_code == exit_code
    assert f"Checkpoint: {folder}" in result.stderr
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Resume:")]
    assert line.split() == [
        *("Resume:", "trl-moe", "async-grpo", *COMPLETE),
        *("--run_name", "'a", "b'", "--resume_from_checkpoint", "true"),
    ]
    assert [call[0] for call in trainer.called] == ["train", "train"]


def test_a_mistake_that_the_trainer_finds_is_one_too(trainer: type[StubTrainer]) -> None:
    trainer.ends_with = ConfigError("out has no checkpoint to resume from")
    assert "out has no checkpoint" in error_of(*COMPLETE, "--resume_from_checkpoint", "true")


# -- the command itself -----------------------------------------------------------------------------------------------

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
PROGRAM = [sys.executable, "-m", "trl_moe_ext.cli.main", "async-grpo"]
RECIPE = ["--config", "configs/quickstart/grpo.yaml", "--logging_steps", "1"]


def test_help_is_that_of_the_parser_and_the_module_can_be_launched() -> None:
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "usage: trl-moe async-grpo" in text
    for option in ("--peft_type", "--max_staleness", "--reward_funcs", "--importance_correction", "--dtype"):
        assert f"{option} " in text


@pytest.mark.slow
def test_a_run_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """Ctrl-C, the code and the line of it; then the run goes on from there to its end and saves the adapter."""
    out = tmp_path / "out"
    words = [*PROGRAM, *RECIPE, "--output_dir", str(out), "--max_steps", "200", "--save_strategy", "no"]
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=file, env=ENVIRONMENT, cwd=ROOT)
        try:
            # The version rises with each step.
            wait_for(lambda: (out / "rollout.json").exists() and version_of(out) >= 2, process)
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 128 + signal.SIGINT, errors.read_text()
        finally:
            process.kill()
    told = errors.read_text()
    assert "Resume:     trl-moe async-grpo --config configs/quickstart/grpo.yaml" in told
    [checkpoint] = out.glob("checkpoint-*")
    step = int(checkpoint.name.partition("-")[2])
    assert step >= 2
    again = [*PROGRAM, *RECIPE, "--output_dir", str(out), "--save_strategy", "no", "--resume_from_checkpoint", "true"]
    done = subprocess.run(
        [*again, "--max_steps", str(step + 1)], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "adapter_model.safetensors").exists()
    assert "Adapter:" in done.stdout


def version_of(output_dir: Path) -> int:
    return int(json.loads((output_dir / "rollout.json").read_text())["model_version"] or 0)


def wait_for(condition: Any, process: subprocess.Popen[bytes], timeout: float = 180) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_page_names_every_option_of_ours() -> None:
    page = (ROOT / "docs" / "grpo.md").read_text()
    stock = {option.name for option in fields(AsyncGRPOConfig)} - {"token_budget", "heartbeat_stale_after_s"}
    for option in fields(AsyncMoeGRPOConfig):
        if option.name not in stock:
            assert f"`{option.name}`" in page, option.name
