"""The state of the rollouts in a checkpoint, and which checkpoint is whole."""

from __future__ import annotations

import json

import pytest

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.checkpoint import RolloutState, check_unused, last_whole_checkpoint

STATE = RolloutState(model_version=7, is_published=True, worker={"num_done": 3, "first_undone": 3, "done_beyond": []})


def test_there_and_back(tmp_path):
    folder = tmp_path / "checkpoint-7"
    STATE.save(folder)
    assert RolloutState.load(folder) == STATE
    assert [path.name for path in folder.iterdir()] == ["rollout_state.json"], "no unfinished file is left"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "not known; resume from a checkpoint of AsyncMoeGRPOTrainer"),
        ("{", "is damaged"),
        ('{"prompt_index": 3}', "is damaged"),
    ],
    ids=["of another trainer", "cut off", "of TRL"],
)
def test_what_cannot_be_read(tmp_path, text, message):
    if text is not None:
        (tmp_path / "rollout_state.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        RolloutState.load(tmp_path)


def checkpoint(folder, step: int, *, trainer_state: str | None = "{}", rollout: bool = True) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if rollout:
        STATE.save(path)
    if trainer_state is not None:
        (path / "trainer_state.json").write_text(trainer_state)


def test_the_newest_whole_checkpoint(tmp_path, caplog):
    """By number and not by name; one that a killed process left behind is passed over, and told."""
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 11, trainer_state=None)
    checkpoint(tmp_path, 12, trainer_state=json.dumps({"global_step": 12})[:-3])
    checkpoint(tmp_path, 13, rollout=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-10"
    assert [record.args[0].name for record in caplog.records] == ["checkpoint-13", "checkpoint-12", "checkpoint-11"]


def test_one_that_is_written_again_is_not_whole_until_the_end(tmp_path):
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    STATE.save(tmp_path / "checkpoint-10")
    assert last_whole_checkpoint(tmp_path).name == "checkpoint-9"


def test_a_used_folder(tmp_path):
    """What is never resumed from is in nobody's way."""
    check_unused(tmp_path / "nothing")
    checkpoint(tmp_path, 4, trainer_state=None)
    (tmp_path / "checkpoint-best").mkdir()
    check_unused(tmp_path)
    checkpoint(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"holds checkpoint-3 of an earlier run.*resume_from_checkpoint=True"):
        check_unused(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        last_whole_checkpoint(tmp_path / "nothing")
