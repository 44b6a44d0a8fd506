"""The history of the load is bounded, even, and survives a resume and a damaged file."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.history import MAX_RECORDS, LoadRecord, RouterHistory, relative_load
from trl_moe_ext.router.layer_curves import LayerCurves


def history_of(steps) -> RouterHistory:
    history = RouterHistory()
    for step in steps:
        history.append(step, {"0": [0.25, 0.75]})
    return history


def steps_of(history: RouterHistory) -> list[int]:
    return [record.step for record in history.records]


@pytest.mark.parametrize("every", [1, 10])
@pytest.mark.parametrize("records", [1, 2, 3, 199, 200, 201, 202, 999, 5000])
def test_it_is_bounded_even_and_keeps_both_ends(records, every):
    steps = steps_of(history_of(range(every, every * records + 1, every)))
    assert len(steps) <= MAX_RECORDS
    assert steps[0] == every
    assert steps[-1] == every * records
    distances = {b - a for a, b in itertools.pairwise(steps)}
    assert len(distances - {steps[-1] - steps[-2] if len(steps) > 1 else 0}) <= 1, "the last may be nearer, no other"
    if records > MAX_RECORDS:
        assert len(steps) > MAX_RECORDS / 2 - 1, "more was dropped than every second one"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=900))
def test_any_distances_of_steps_are_bounded_and_ascending(distances):
    given_steps = list(itertools.accumulate(distances))
    steps = steps_of(history_of(given_steps))
    assert steps[0] == given_steps[0]
    assert steps[-1] == given_steps[-1]
    assert len(steps) <= MAX_RECORDS
    assert all(a < b for a, b in itertools.pairwise(steps))


def test_what_is_saved_comes_back(tmp_path):
    history = history_of([1, 2, 5])
    history.append(9, {"0": torch.tensor([1 / 3, 2 / 3]), "encoder.1": (1.0,)})
    history.save(tmp_path / "router_history.json")
    again = RouterHistory.load(tmp_path / "router_history.json")
    assert again.records == history.records
    assert again.records[-1] == LoadRecord(9, {"0": (0.33333, 0.66667), "encoder.1": (1.0,)})
    assert again.labels == ["0", "encoder.1"]
    assert json.loads((tmp_path / "router_history.json").read_text())["records"][0] == {
        "step": 1,
        "layers": {"0": [0.25, 0.75]},
    }
    assert [path.name for path in tmp_path.iterdir()] == ["router_history.json"]


def test_a_resume_forgets_what_comes_again_and_goes_on():
    history = history_of([10, 20, 30, 40])
    with pytest.raises(ValueError, match=r"step 30 is before .* step 40; call truncate\(30\)"):
        history.append(30, {})
    history.truncate(25)
    assert steps_of(history) == [10, 20]
    history.append(30, {"0": [1.0, 0.0]})
    assert history.max_vio("0") == [(10, 0.5), (20, 0.5), (30, 1.0)]


def test_a_record_of_the_same_step_is_replaced():
    history = history_of([10, 20])
    history.append(20, {"0": [0.5, 0.5]})
    assert history.max_vio("0") == [(10, 0.5), (20, 0.0)]


def test_no_file_is_an_empty_history_and_a_damaged_one_an_error(tmp_path):
    file = tmp_path / "router_history.json"
    assert RouterHistory.load(file).records == []
    for damage in ("", "[]", '{"records": [{"step": 1}]}', '{"records": [{"step": 1, "layers": [3]}]}'):
        file.write_text(damage)
        with pytest.raises(ConfigError, match=r"router_history.json is damaged .* remove it"):
            RouterHistory.load(file)


def test_a_layer_without_tokens_is_left_out():
    history = RouterHistory()
    history.append(1, {"0": [math.nan, math.nan], "1": [1.0]})
    assert history.labels == ["1"]
    assert math.isnan(relative_load([0.0, 0.0])[0])


def test_the_table_has_gaps_where_a_layer_is_missing_or_narrow():
    record = LoadRecord(1, {"0": (0.1, 0.2, 0.7), "2": (0.5, 0.5)})
    table = record.table(["0", "1", "2"])
    assert table[0] == pytest.approx([0.3, 0.6, 2.1])
    assert [math.isnan(load) for load in table[1]] == [True] * 3
    assert table[2][:2] == [1.0, 1.0]
    assert math.isnan(table[2][2])


def test_the_curves_of_the_history_and_of_the_log_are_the_same():
    history = RouterHistory()
    history.append(1, {"0": [0.5, 0.5], "3": [0.25, 0.75]})
    history.append(2, {"0": [1.0, 0.0], "3": [0.25, 0.75]})
    logged = [
        {"step": 1, "loss": 1.0, "router/max_vio": 0.25, "router/max_vio/0": 0.0, "router/max_vio/3": 0.5},
        {"step": 1, "eval_loss": 1.0},
        {"step": 2, "router/max_vio": 0.75, "router/max_vio/0": 1.0, "router/max_vio/3": 0.5, "router/max_vio_max": 1},
        {"step": 3, "router/max_vio": None, "router/max_vio/0": math.nan},
    ]
    curves = LayerCurves.max_vio(history)
    assert curves == LayerCurves.from_log(logged, "router/max_vio")
    assert curves.mean == [(1, 0.25), (2, 0.75)]
    assert curves.highest == "0"
