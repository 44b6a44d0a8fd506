"""A run that goes on from a checkpoint: the prompts, the versions and the weights of one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from tests.grpo.test_trainer import RecordingBackend, logged
from tests.grpo.trainer_runs import PROMPTS, make_trainer
from tests.tolerances import assert_output_close
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rollout.worker import RolloutWorker

# Every sample is made with the newest adapter, and scored in the order of the prompts: two runs differ in nothing.
OPTIONS = {
    "max_staleness": 0,
    "reward_concurrency": 1,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 1,
}


@pytest.fixture
def finished(monkeypatch) -> list[int]:
    """The groups that were trained on, in the order of the steps."""
    found: list[int] = []
    stock = RolloutWorker.groups_finished

    def groups_finished(self, ids):
        found.extend(ids)
        stock(self, ids)

    monkeypatch.setattr(RolloutWorker, "groups_finished", groups_finished)
    return found


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in get_peft_model_state_dict(trainer.model).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_output_close(found[name], tensor, torch.float32)


@pytest.mark.parametrize(("weight_sync_steps", "stop", "version"), [(1, 3, 3), (2, 2, 1)])
def test_stopped_and_resumed_is_as_never_stopped(weight_sync_steps, stop, version, tmp_path, finished):
    options = OPTIONS | {"weight_sync_steps": weight_sync_steps}
    whole = make_trainer(tmp_path / "whole", max_steps=5, **options)
    whole.train()
    expected, expected_ids = weights(whole), finished[:]
    finished.clear()
    make_trainer(tmp_path / "parts", max_steps=stop, **options).train()
    backend = RecordingBackend()
    resumed = make_trainer(tmp_path / "parts", backend, max_steps=5, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert sorted(finished) == sorted(expected_ids) == [*range(10)], "each prompt once"
    assert_same(weights(resumed), expected)
    assert backend.starts == [version], "the versions go on"
    assert resumed.model_version == whole.model_version


def test_between_two_syncs_the_weights_are_those_of_no_version_yet(tmp_path, finished):
    options = OPTIONS | {"weight_sync_steps": 2}
    make_trainer(tmp_path, max_steps=3, **options).train()
    backend = RecordingBackend()
    resumed = make_trainer(tmp_path, backend, max_steps=5, **options)
    resumed.train(resume_from_checkpoint=True)
    assert backend.starts == [2]
    assert len({*finished}) == len(finished) == 10, "no prompt twice"


def test_resuming_counts_epochs_on(tmp_path, finished):
    """One epoch of ten prompts, two a step, three steps before and two after."""
    options = OPTIONS | {"num_train_epochs": 1}
    make_trainer(tmp_path, max_steps=3, **options).train()
    resumed = make_trainer(tmp_path, max_steps=-1, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert sorted(finished) == [*range(10)]
    assert logged(resumed, "batch/groups_per_step")[-2:] == [2, 2]


def test_a_half_written_checkpoint_is_passed_over(tmp_path, finished):
    make_trainer(tmp_path, max_steps=3, **OPTIONS).train()
    (tmp_path / "checkpoint-3" / "trainer_state.json").unlink()
    finished[:] = finished[:4]
    resumed = make_trainer(tmp_path, max_steps=3, **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    assert sorted(finished) == [*range(6)]


@pytest.mark.parametrize("end", [{"max_steps": 5}, {"max_steps": -1, "num_train_epochs": 1}], ids=["steps", "epochs"])
@pytest.mark.parametrize("save_strategy", ["steps", "epoch"])
def test_a_run_that_was_finished_is_resumed_without_a_step(end, save_strategy, tmp_path, finished):
    """It is not even generated for, and its checkpoint stays as it is."""
    make_trainer(tmp_path, **OPTIONS | end).train()
    expected, before = finished[:], times(tmp_path / "checkpoint-5")
    backend = RecordingBackend()
    resumed = make_trainer(tmp_path, backend, **OPTIONS | end | {"save_strategy": save_strategy})
    result = resumed.train(resume_from_checkpoint=True)
    assert result.global_step == resumed.state.global_step == 5
    assert (backend.starts, finished) == ([], expected)
    assert times(tmp_path / "checkpoint-5") == before
    assert not (tmp_path / "checkpoint-6").exists()


def test_before_its_first_step_a_resumed_run_writes_nothing(tmp_path):
    """The checkpoint that it comes from may be the only one, and a second signal or a kill would damage it."""

    class Stop(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    make_trainer(tmp_path, max_steps=1, **OPTIONS).train()
    before = times(tmp_path / "checkpoint-1")
    resumed = make_trainer(tmp_path, max_steps=2, callbacks=[Stop()], **OPTIONS)
    with pytest.raises(SystemExit):
        resumed.train(resume_from_checkpoint=True)
    assert times(tmp_path / "checkpoint-1") == before


def test_a_fresh_run_does_not_mix_with_an_older_one(tmp_path):
    make_trainer(tmp_path, max_steps=2, **OPTIONS).train()
    backend = RecordingBackend()
    trainer = make_trainer(tmp_path, backend, max_steps=3, **OPTIONS)
    with pytest.raises(ConfigError, match="checkpoint-2 of an earlier run"):
        trainer.train()
    assert not backend.starts
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def times(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_what_was_in_the_queue_is_generated_again(tmp_path, finished):
    """The generator may be three versions ahead: what it made for them is not in the checkpoint."""
    options = OPTIONS | {"max_staleness": 3}
    make_trainer(tmp_path, max_steps=2, **options).train()
    resumed = make_trainer(tmp_path, max_steps=5, **options)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(finished) == [*range(10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 7}, "seed"),
        ({"train_dataset": Dataset.from_dict({"prompt": PROMPTS["prompt"][:7]})}, "'rows': 10"),
        (None, "has no rollout_state.json"),
    ],
    ids=["seed", "dataset", "no state"],
)
def test_another_run_is_refused(change, message, tmp_path):
    make_trainer(tmp_path, max_steps=1, **OPTIONS).train()
    checkpoint = tmp_path / "checkpoint-1"
    if change is None:
        (checkpoint / "rollout_state.json").unlink()
    trainer = make_trainer(tmp_path, max_steps=2, **OPTIONS | (change or {}))
    with pytest.raises(ConfigError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_what_a_checkpoint_says(tmp_path):
    make_trainer(tmp_path, max_steps=3, **OPTIONS | {"weight_sync_steps": 2}).train()
    states = [json.loads(Path(tmp_path, f"checkpoint-{n}", "rollout_state.json").read_text()) for n in (1, 2, 3)]
    assert [(s["model_version"], s["is_published"], s["worker"]["num_done"]) for s in states] == [
        (0, False, 2),
        (1, True, 4),
        (1, False, 6),
    ]
