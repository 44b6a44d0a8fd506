"""A profile in its file, and every way in which that can be damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.profiles.made import layer_use, profile_of
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.profiles.profile import ExpertProfile


def test_a_file_gives_back_the_profile(tmp_path: Path) -> None:
    profile = profile_of([0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3])
    profile.save(tmp_path / "profile.json")
    assert ExpertProfile.load(tmp_path / "profile.json") == profile
    assert os.listdir(tmp_path) == ["profile.json"]


def test_shares_are_scaled_to_one() -> None:
    layer = layer_use([0.5, 0.5], gate_score=[0.3, 0.1])
    assert layer.shares() == (0.5, 0.5)
    assert layer.shares("gate_score") == pytest.approx((0.75, 0.25))
    assert layer_use([0.0] * 4).shares() == (0.25,) * 4


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json does not exist; make it with: trl-moe profile MODEL --dataset"):
        ExpertProfile.load(tmp_path / "none.json")


def _without(name: str):
    def change(stored: dict) -> None:
        del stored["layers"][0][name]

    return change


DAMAGES = {
    "version": lambda stored: stored.update(version=99),
    "no version": lambda stored: stored.pop("version"),
    "no layers": lambda stored: stored.pop("layers"),
    "layers of another kind": lambda stored: stored.update(layers=[3]),
    "an unknown key": lambda stored: stored.update(surprise=1),
    "different lengths": lambda stored: stored["layers"][0]["gate_score"].pop(),
    "no experts": lambda stored: stored["layers"][0].update(token_share=[], gate_score=[]),
    "no modules": lambda stored: stored["layers"][0].update(experts=[]),
    "a negative share": lambda stored: stored["layers"][0].update(token_share=[1.5, -0.5]),
    "not a number": lambda stored: stored["layers"][0].update(gate_score=[float("nan"), 0.5]),
    "a word": lambda stored: stored["layers"][0].update(gate_score=["much", 0.5]),
    **{f"no {name}": _without(name) for name in ("label", "router", "top_k", "fingerprint", "token_share")},
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file(tmp_path: Path, damage) -> None:
    stored = json.loads(json.dumps(profile_of([0.5, 0.5]).to_dict()))
    damage(stored)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(stored))
    with pytest.raises(ConfigError, match=r"profile\.json is not a profile of experts \(.*`trl-moe profile`"):
        ExpertProfile.load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"version": 1}'])
def test_a_file_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a profile of experts"):
        ExpertProfile.load(tmp_path / "profile.json")
