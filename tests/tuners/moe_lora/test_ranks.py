"""Ranks of single experts: one's own beside those by share, and entries that nothing could come of."""

from __future__ import annotations

import pytest
from peft import PeftModel, get_peft_model

from tests.families import build
from tests.tuners.selection.made import save_profile
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.profiles.choose import ranks_by_share

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
SHARES = (0.3, 0.05, 0.2, 0.05, 0.2, 0.1, 0.05, 0.05)
RANK = 8


@pytest.fixture
def selection(tmp_path):
    return save_profile(build("qwen3_moe"), "qwen3_moe", tmp_path / "profile.json", SHARES)


def ranks_of(model, name):
    classes = model.get_submodule(f"base_model.model.{name}").rank_classes["default"]
    return {expert: each.rank for each in classes for expert in each.experts(len(SHARES))}


def adapted(**options):
    return get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=RANK, moe_target=["experts"], **options))


@pytest.mark.parametrize("own", [f"{FIRST}.0", "layers.0.mlp.experts.0", r"layers\.0\..*experts\.[0]"])
def test_an_expert_keeps_its_own_rank_and_the_others_share_the_rest(selection, own):
    model = adapted(expert_selection=selection, expert_rank="by_share", rank_pattern={own: 3})
    expected = ranks_by_share(SHARES, range(1, 8), RANK)
    assert ranks_of(model, FIRST) == {0: 3} | expected
    assert ranks_of(model, SECOND) == ranks_by_share(SHARES, range(8), RANK)
    assert expected != {e: r for e, r in ranks_of(model, SECOND).items() if e}, "its budget is for the others alone"


OVERLAPPING = [
    ({f"{FIRST}.0": 3, r"experts\.\d+": 5}, {0: 3}),
    ({r"experts\.\d+": 5, f"{FIRST}.0": 3}, {0: 3}),
    ({"layers.0.mlp.experts.0": 3, r"experts\.\d+": 5}, {0: 3}),
    ({r"experts\.\d+": 5, "layers.0.mlp.experts.0": 3}, {}),
    ({r"layers\.0\..*experts\.[01]": 3, r"experts\.\d+": 5}, {0: 3, 1: 3}),
]


@pytest.mark.parametrize(("entries", "others"), OVERLAPPING)
def test_a_full_name_counts_before_expressions_and_of_these_the_first(entries, others, tmp_path):
    """In the file too, where they are sorted."""
    expected = dict.fromkeys(range(8), 5) | others
    model = adapted(rank_pattern=entries)
    assert ranks_of(model, FIRST) == expected
    for folder in (tmp_path / "once", tmp_path / "again"):
        model.save_pretrained(folder)
        model = PeftModel.from_pretrained(build("qwen3_moe"), folder)
        assert ranks_of(model, FIRST) == expected


def test_a_full_name_of_an_expert_that_is_not_selected_is_refused_beside_an_expression():
    entries = {f"{FIRST}.5": 3, r"experts\.\d+": 5}
    with pytest.raises(ConfigError, match=r"names expert 5 .* which is not selected"):
        adapted(selected_experts={FIRST: [0, 2], SECOND: [1]}, rank_pattern=entries)


def test_own_ranks_for_all_leave_none_by_share(selection):
    with pytest.raises(ConfigError, match="expert_rank='by_share' has no effect: rank_pattern has a rank for every"):
        adapted(expert_selection=selection, expert_rank="by_share", rank_pattern={r"experts\.\d+": 3})


def test_equal_ranks_by_share_are_told(tmp_path):
    even = save_profile(build("qwen3_moe"), "qwen3_moe", tmp_path / "profile.json", [0.125] * 8)
    with pytest.warns(UserWarning, match="gives all experts the same rank"):
        adapted(expert_selection=even, expert_rank="by_share")


@pytest.mark.parametrize("rank", [0, 4.5, "8"])
def test_what_is_no_rank_is_refused(rank):
    with pytest.raises(ConfigError, match=r"rank_pattern\['experts.0'\]=.* is not a rank"):
        adapted(rank_pattern={"experts.0": rank})


@pytest.mark.parametrize("key", [f"{FIRST}.8", "layers.0.mlp.experts.99"])
def test_the_rank_of_an_expert_that_there_is_not_is_refused(key):
    with pytest.raises(ConfigError, match=r"rank_pattern names .* has 8 experts \(the first is 0\)"):
        adapted(rank_pattern={key: 4})


def test_the_rank_of_a_module_is_the_mean_of_its_ranks_by_share(selection):
    model = adapted(expert_selection=selection, expert_rank="by_share", rank_pattern={"layers.0.mlp.experts": 16})
    assert ranks_of(model, FIRST) == ranks_by_share(SHARES, range(8), 16)


def switch(**options):
    model = build("switch_transformers")
    containers = sorted({*read_anatomy(model.named_modules()).expert_linears.values()})
    selected = {name: [1, 2] for name in containers}
    return containers[0], lambda entry: get_peft_model(
        model, MoeLoraConfig(r=4, moe_target=["experts"], selected_experts=selected, rank_pattern=entry, **options)
    )


def test_a_rank_of_an_expert_that_is_a_module_of_its_own():
    container, adapt = switch()
    model = adapt({f"{container}.2": 7})
    ranks = {
        name.removeprefix("base_model.model."): p.shape[0] for name, p in model.named_parameters() if "lora_A" in name
    }
    assert {rank for name, rank in ranks.items() if name.startswith(f"{container}.expert_2.")} == {7}
    assert {rank for name, rank in ranks.items() if not name.startswith(f"{container}.expert_2.")} == {4}


@pytest.mark.parametrize("of_layer", ["{}.0", r"mlp.experts.(0|3)"])
def test_a_rank_of_such_an_expert_that_is_not_selected_is_refused(of_layer):
    container, adapt = switch()
    with pytest.raises(ConfigError, match=rf"names expert 0 of '{container}' \(.*, which is not selected"):
        adapt({of_layer.format(container): 7})


def test_a_pattern_of_a_selected_expert_and_another_is_taken():
    _, adapt = switch()
    model = adapt({r"mlp.experts.(0|1)": 7})
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name and ".expert_1." in name} == {7}


def test_a_rank_in_a_layer_that_is_left_out_is_told():
    with pytest.warns(RuntimeWarning, match=f"rank_pattern keys did not match .*{FIRST}.2"):
        adapted(layers_to_transform=[1], rank_pattern={f"{FIRST}.2": 3})
