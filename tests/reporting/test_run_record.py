"""The record of a run is there when the run is killed, and knows each step once when it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from tests.families import build
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.reporting.adapted import adapted_parts
from trl_moe_ext.reporting.record_callback import RunRecordCallback
from trl_moe_ext.reporting.run_record import RECORD_FILE, Mark, RunRecord, Session, TrainedPart
from trl_moe_ext.reporting.run_recorder import RunRecorder
from trl_moe_ext.router.history import HISTORY_FILE

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"


class Clock:
    """A clock that stands still until it is told how much time has gone by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("trl_moe_ext.reporting.run_recorder.time", clock)
    return clock


@pytest.fixture(scope="module")
def model():
    return get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3))


class Run:
    """A run step by step: each takes ten seconds and 100 tokens."""

    def __init__(self, directory: Path, model, clock: Clock, history=(), max_steps: int = 4, **options) -> None:
        self.clock = clock
        step = max((row["step"] for row in history), default=0)
        self.state = TrainerState(global_step=step, max_steps=max_steps, log_history=list(history))
        args = SimpleNamespace(output_dir=str(directory), learning_rate=0.1, hub_token="secret", **options)
        self.recorder = RunRecorder(args, self.state, model)
        self.tokens = 0

    def steps(self, *numbers: int) -> None:
        for number in numbers:
            self.clock.now += 10
            self.tokens += 100
            self.state.global_step = number
            self.log(loss=1 / number, num_tokens=self.tokens)

    def log(self, **values) -> None:
        self.state.log_history.append({**values, "step": self.state.global_step})
        self.recorder.on_log(self.state)

    def save(self) -> None:
        self.recorder.on_save(self.state)

    def end(self) -> None:
        self.recorder.on_train_end(self.state)


def read(directory: Path) -> RunRecord:
    return RunRecord.load(directory / RECORD_FILE)


def test_what_is_saved_comes_back_with_none_for_what_is_not_finite(tmp_path):
    record = RunRecord(
        log_history=[{"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": torch.tensor(0.5)}],
        marks=[Mark(0, 0.0, 0), Mark(1, 2.5, 7)],
        sessions=[Session("2026-01-01T00:00:00+00:00", "2026-01-01T00:00:03+00:00", 0)],
        adapted=[TrainedPart("router", 2, 30)],
        settings={"adapter": {"target_modules": {"v_proj", "q_proj"}, "path": Path("a")}},
        peak_memory={"process": 3},
        is_finished=True,
    )
    record.save(tmp_path)
    text = (tmp_path / RECORD_FILE).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    again = read(tmp_path)
    assert again.log_history == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}]
    assert again.settings == {"adapter": {"target_modules": ["q_proj", "v_proj"], "path": "a"}}
    assert (again.marks, again.sessions, again.adapted) == (record.marks, record.sessions, record.adapted)
    assert (again.peak_memory, again.is_finished) == ({"process": 3}, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("[]", "holds a list"),
        ('{"format": 99}', "another version of trl_moe_ext"),
        ('{"format": 1}', "is damaged .*marks"),
        ('{"format": 1, "marks": [], "sessions": [], "adapted": [], "colour": 3}', "is damaged .*colour"),
    ],
)
def test_a_damaged_record_says_so(tmp_path, text, message):
    (tmp_path / RECORD_FILE).write_text(text)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path)


def test_it_is_written_at_the_first_log_then_every_ten_seconds_at_most(tmp_path, model, clock):
    run = Run(tmp_path, model, clock)
    run.steps(1)
    assert read(tmp_path).step == 1
    clock.now -= 9  # the next log comes a second after this one
    run.steps(2)
    assert read(tmp_path).step == 1, "written again after a second"
    run.steps(3)
    assert read(tmp_path).step == 3
    assert not read(tmp_path).is_finished


def test_a_checkpoint_is_in_the_record_at_once(tmp_path, model, clock):
    run = Run(tmp_path, model, clock)
    run.steps(1)
    clock.now -= 9
    run.steps(2)
    run.save()
    assert read(tmp_path).step == 2


def test_evaluation_and_saving_are_not_training(tmp_path, model, clock):
    run = Run(tmp_path, model, clock)
    run.steps(1, 2)
    clock.now += 5
    run.log(eval_loss=1.0)
    clock.now += 3
    run.save()
    run.steps(3, 4)
    run.end()
    record = read(tmp_path)
    assert record.training == Mark(step=4, seconds=40.0, tokens=400)
    assert record.wall_seconds == 48
    assert record.is_finished


def test_an_evaluation_after_the_end_counts_but_not_the_time_before_it(tmp_path, model, clock):
    run = Run(tmp_path, model, clock, max_steps=1)
    run.steps(1)
    run.end()
    clock.now += 3600
    run.log(eval_loss=0.5)
    assert read(tmp_path).wall_seconds == 10
    assert read(tmp_path).log_history[-1] == {"eval_loss": 0.5, "step": 1}


def test_a_resume_counts_each_step_once_and_tells_the_lost_time(tmp_path, model, clock, monkeypatch):
    peaks = iter([{"process": 5}, {"process": 9}] + [{"process": 7, "cuda:0": 1}] * 9)
    monkeypatch.setattr("trl_moe_ext.reporting.run_facts.peak_memory", lambda: next(peaks))
    killed = Run(tmp_path, model, clock)
    killed.steps(1, 2)
    killed.save()
    history = list(killed.state.log_history)
    killed.steps(3)  # written, and lost: the checkpoint is of step 2
    clock.now += 500
    again = Run(tmp_path, model, clock, history)
    again.steps(3, 4)
    again.end()
    record = read(tmp_path)
    assert [row["step"] for row in record.log_history] == [1, 2, 3, 4]
    assert record.training == Mark(step=4, seconds=40.0, tokens=400)
    assert (record.lost_seconds, record.wall_seconds) == (10, 50)
    assert [session.first_step for session in record.sessions] == [0, 2]
    assert record.peak_memory == {"process": 9, "cuda:0": 1}


def test_a_resume_of_a_resume(tmp_path, model, clock):
    history = []
    for first in (1, 2, 3):
        run = Run(tmp_path, model, clock, history)
        run.steps(first)
        run.save()
        history = list(run.state.log_history)
        run.steps(first + 1)
    record = read(tmp_path)
    assert record.lost_seconds == 20
    assert [mark.tokens for mark in record.marks] == sorted(mark.tokens for mark in record.marks)
    assert record.training == Mark(step=4, seconds=40.0, tokens=400)


def test_a_resume_elsewhere_knows_what_it_does_not_know(tmp_path, model, clock):
    run = Run(tmp_path, model, clock, [{"step": 2, "loss": 0.5}])
    run.steps(3, 4)
    run.end()
    record = read(tmp_path)
    assert record.training == Mark(step=2, seconds=20.0, tokens=200)
    assert record.sessions[0].first_step == 2
    assert [row["step"] for row in record.log_history] == [2, 3, 4]


def test_a_new_run_in_an_old_directory_starts_anew(tmp_path, model, clock):
    for _ in range(2):
        run = Run(tmp_path, model, clock)
        run.steps(1, 2)
        run.end()
    assert read(tmp_path).wall_seconds == 20
    assert len(read(tmp_path).sessions) == 1


def test_the_routing_of_an_earlier_run_is_none_of_a_new_one(tmp_path, model, clock):
    """Which may have no router; the page of a run shows what stands beside its record."""
    history = tmp_path / HISTORY_FILE
    history.write_text("of the earlier run")
    Run(tmp_path, model, clock, [{"step": 4}])
    assert history.exists(), "a run that goes on has it"
    Run(tmp_path, model, clock)
    assert not history.exists()


def test_a_damaged_record_does_not_stop_a_resume(tmp_path, model, clock):
    (tmp_path / RECORD_FILE).write_text("{")
    with pytest.warns(RuntimeWarning, match="will lack what was before step 2"):
        run = Run(tmp_path, model, clock, [{"step": 2, "loss": 0.5}])
    run.steps(3)
    assert read(tmp_path).training.step == 1


def test_a_full_disk_does_not_stop_a_run(tmp_path, model, clock, monkeypatch):
    run = Run(tmp_path, model, clock)

    def fail(record, directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunRecord, "save", fail)
    with pytest.warns(RuntimeWarning, match=r"moe_run.json was not written: .*No space left"):
        run.steps(1)


def test_tokens_that_the_state_counts_go_on_after_a_resume(tmp_path, model, clock):
    state = TrainerState(global_step=2, max_steps=4, num_input_tokens_seen=500, log_history=[{"step": 2}])
    recorder = RunRecorder(SimpleNamespace(output_dir=str(tmp_path)), state, model)
    clock.now += 1
    state.global_step, state.num_input_tokens_seen = 3, 620
    state.log_history.append({"step": 3, "num_tokens": 620})
    recorder.on_log(state)
    assert read(tmp_path).training.tokens == 120


def test_it_holds_what_matters_and_no_secret(tmp_path, model, clock):
    run = Run(tmp_path, model, clock, router_metrics="full", router_losses={"z_loss": 1e-3}, world_size=2)
    run.steps(1)
    record = read(tmp_path)
    assert record.settings["training"] == {"learning_rate": 0.1}
    assert record.settings["router"] == {"router_metrics": "full", "router_losses": {"z_loss": 1e-3}}
    adapter = record.settings["adapter"]
    assert (adapter["peft_type"], adapter["r"], adapter["moe_target"]) == ("MOE_LORA", 3, ["experts", "attention"])
    assert "init_lora_weights" not in adapter, "an option at its default"
    assert [part.parameters for part in record.adapted] == [part.parameters for part in adapted_parts(model)]
    assert record.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert record.model["class"] == "Qwen3MoeForCausalLM"
    assert record.machine["processes"] == 2
    assert record.versions["torch"] == torch.__version__
    assert 10**7 < record.peak_memory["process"] < record.memory["process"]
    assert "secret" not in (tmp_path / RECORD_FILE).read_text()


def test_other_processes_write_nothing(tmp_path, model):
    callback, state = RunRecordCallback(), TrainerState(is_world_process_zero=False)
    args = SimpleNamespace(output_dir=str(tmp_path))
    callback.on_train_begin(args, state, None, model=model)
    for event in (callback.on_log, callback.on_save):
        event(args, state, None)
    callback.on_train_end(args, state, None, model=model)
    assert list(tmp_path.iterdir()) == []


class KilledError(Exception):
    """What stands for a process that ends in the middle of training."""


class Killer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KilledError


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory.*:UserWarning")
def test_a_real_run_that_is_killed_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_moe_ext.reporting.callback.atexit.register", lambda word: None)

    def trainer(*callbacks):
        return SFTTrainer(
            model=str(QUICKSTART / "model"),
            args=SFTConfig(
                output_dir=str(tmp_path),
                max_steps=4,
                save_steps=2,
                logging_steps=1,
                max_length=64,
                report_to="none",
                use_cpu=True,
                bf16=False,
                per_device_train_batch_size=2,
            ),
            train_dataset=load_dataset(str(QUICKSTART / "data"), split="train[:16]"),
            peft_config=MoeLoraConfig(r=2),
            callbacks=[RunRecordCallback(), *callbacks],
        )

    with pytest.raises(KilledError):
        trainer(Killer()).train()
    assert not read(tmp_path).is_finished
    assert read(tmp_path).step == 2
    trainer().train(resume_from_checkpoint=True)
    record = read(tmp_path)
    assert record.is_finished
    assert [row["step"] for row in record.log_history if "loss" in row] == [1, 2, 3, 4]
    assert [session.first_step for session in record.sessions] == [0, 2]
    training = record.training
    assert training.step == 4
    assert 0 < training.seconds < record.wall_seconds
    assert 4 * 2 * 5 < training.tokens <= 4 * 2 * 64
    assert record.model["name"].endswith("model")
