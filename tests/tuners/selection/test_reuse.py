"""One config for several models: its profile decides each time, and what an earlier use wrote has to agree."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from peft import PeftConfig, get_peft_model

from tests.families import build
from tests.tuners.selection.made import save_profile
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.profiles.profile import ExpertProfile
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig

# Two or three experts of a layer leave little to share.
pytestmark = pytest.mark.filterwarnings("ignore:expert_rank='by_share' gives all experts the same rank")
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
SHARES = (0.3, 0.05, 0.2, 0.05, 0.2, 0.1, 0.05, 0.05)
REVERSED = SHARES[::-1]
KINDS = {"moe_lora": MoeLoraConfig, "moe_esft": MoeEsftConfig}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "profile.json"


@pytest.fixture
def selection(path):
    return save_profile(build("qwen3_moe"), "qwen3_moe", path, SHARES)


def used(config, name="default"):
    return get_peft_model(build("qwen3_moe"), config).peft_config[name]


def used_with(selection, kind="moe_lora", **options):
    return used(KINDS[kind](expert_selection=selection, moe_target=["experts"], **{"experts_per_layer": 2} | options))


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_model_gets_the_same_experts(kind, selection):
    config = used_with(selection, kind)
    assert used(config).selected_experts == {FIRST: [0, 2], SECOND: [0, 2]}
    assert used(copy.deepcopy(config)).selected_experts == config.selected_experts


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_model_is_compared_with_the_profile(kind, selection):
    config = used_with(selection, kind)
    other = build("qwen3_moe")
    other.model.layers[1].mlp.gate.weight.data.mul_(1.5)
    for again in (config, copy.copy(config), copy.deepcopy(config)):
        with pytest.raises(ConfigError, match="of another model: the weights of the router"):
            get_peft_model(other, again)


@pytest.mark.parametrize("kind", KINDS)
def test_another_profile_under_the_same_name_is_told(kind, selection, path):
    config = used_with(selection, kind)
    save_profile(build("qwen3_moe"), "qwen3_moe", path, REVERSED)
    message = rf"says \[0, 2\] of '{FIRST}', and the profile .* says \[3, 7\] of .*: set selected_experts=None"
    with pytest.raises(ConfigError, match=message):
        used(config)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_with_another_number_says_what_to_do(kind, selection):
    config = used_with(selection, kind)
    more = replace(config, experts_per_layer=3)
    with pytest.raises(ConfigError, match=r"says \[0, 2\] of .* says \[0, 2, 4\] of .* set selected_experts=None"):
        used(more)
    assert used(replace(more, selected_experts=None)).selected_experts[FIRST] == [0, 2, 4]


def test_a_choice_of_some_layers_beside_a_profile_of_all_is_told(selection):
    with pytest.raises(ConfigError, match=rf"says nothing of '{SECOND}', and the profile .* says \[0, 2\] of"):
        used_with(selection, selected_experts={FIRST: [0, 2]})


def test_a_copy_with_another_option_is_taken(selection):
    assert used(replace(used_with(selection), r=3)).selected_experts == {FIRST: [0, 2], SECOND: [0, 2]}


def test_a_choice_beside_a_profile_for_ranks_alone_is_refused(selection):
    config = used_with(selection)
    with pytest.raises(ConfigError, match=r"profile that is there for ranks alone; set selected_experts=None"):
        replace(config, experts_per_layer=None, expert_rank="by_share")


def test_ranks_by_share_are_those_of_each_use(selection, path):
    config = used_with(selection, expert_rank="by_share", experts_per_layer=None, r=8, rank_pattern={"experts.7": 5})
    assert config.rank_pattern == {"experts.7": 5}
    assert _ranks(config)[0] > _ranks(config)[3]
    save_profile(build("qwen3_moe"), "qwen3_moe", path, REVERSED)
    for again in (config, copy.deepcopy(config), replace(config, r=16)):
        ranks = _ranks(used(again))
        assert ranks[0] < ranks[5] > ranks[4], "expert 7 has a rank of its own"
        assert again.to_dict()["rank_pattern"]["experts.7"] == 5
    assert max(ranks.values()) > 8 * 3, "the last copy has a larger mean rank"


def _ranks(config):
    saved = config.to_dict()["rank_pattern"]
    return {expert: saved[f"{FIRST}.{expert}"] for expert in range(7)}


def test_a_second_adapter_on_one_model_reads_the_profile_too(selection, path):
    config = MoeLoraConfig(r=4, expert_selection=selection, expert_rank="by_share", experts_per_layer=2)
    model = get_peft_model(build("qwen3_moe"), config)
    model.add_adapter("second", config)
    layer = model.get_submodule(f"base_model.model.{FIRST}")
    assert layer.rank_classes["second"] == layer.rank_classes["default"]
    save_profile(build("qwen3_moe"), "qwen3_moe", path, REVERSED)
    with pytest.raises(ConfigError, match=r"set selected_experts=None"):
        model.add_adapter("third", config)


def test_the_profile_is_read_once_for_each_use(selection, monkeypatch):
    reads = []
    load = ExpertProfile.load
    monkeypatch.setattr(ExpertProfile, "load", lambda path: reads.append(path) or load(path))
    config = used_with(selection, expert_rank="by_share", r=4)
    assert len(reads) == 1
    used(config)
    assert len(reads) == 2


def test_a_saved_config_is_taken_without_its_profile(selection, path, tmp_path):
    config = used_with(selection, expert_rank="by_share", r=4)
    config.save_pretrained(tmp_path)
    path.unlink()
    loaded = used(PeftConfig.from_pretrained(tmp_path))
    assert loaded.selected_experts == config.selected_experts
    assert loaded.to_dict()["rank_pattern"] == config.to_dict()["rank_pattern"] != {}


@pytest.mark.parametrize("options", [{"experts_per_layer": 2}, {"experts_per_layer": 2, "expert_rank": "by_share"}])
def test_a_config_that_was_saved_before_its_first_use_reads_the_profile(selection, tmp_path, options):
    MoeLoraConfig(r=4, expert_selection=selection, **options).save_pretrained(tmp_path)
    found = used(PeftConfig.from_pretrained(tmp_path))
    expected = used(MoeLoraConfig(r=4, expert_selection=selection, **options))
    assert found.selected_experts == expected.selected_experts == {FIRST: [0, 2], SECOND: [0, 2]}
    assert found.to_dict()["rank_pattern"] == expected.to_dict()["rank_pattern"]


def test_ranks_of_a_config_that_was_saved_before_its_first_use(selection, tmp_path):
    MoeLoraConfig(r=4, expert_selection=selection, expert_rank="by_share").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was saved before it was used\. Set saved_with=None"):
        used(PeftConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_that_is_gone_says_where_the_choice_is(kind, selection, path):
    config = used_with(selection, kind)
    path.unlink()
    with pytest.raises(ConfigError, match=r"json does not exist; make it .* adapter_config.json.* selected_experts"):
        used(config)
    assert used(replace(config, expert_selection="all", experts_per_layer=None)).selected_experts[FIRST] == [0, 2]
