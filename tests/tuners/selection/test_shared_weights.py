"""Modules of experts that share their weights are one choice: contradictions are told, use is counted together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from peft import get_peft_model
from torch import nn

from tests.families import build
from tests.profiles.made import profile_of
from tests.tuners.selection.made import save_profile
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig
from trl_moe_ext.tuners.selection.profiled import uses_of_modules
from trl_moe_ext.tuners.targets.tied import TiedNames

# Two or three experts of a layer leave little to share.
pytestmark = pytest.mark.filterwarnings("ignore:expert_rank='by_share' gives all experts the same rank")
ENCODER, DECODER = "model.encoder.language_model.layers.0.experts", "model.decoder.layers.0.experts"
NUM_EXPERTS = 8


def used(config):
    return get_peft_model(build("diffusion_gemma"), config).peft_config["default"]


def shares_of(*experts):
    """All choices on these experts, the first of them the most."""
    shares = [0.0] * NUM_EXPERTS
    for number, expert in enumerate(experts):
        shares[expert] = 1.5 ** (len(experts) - number)
    return [share / sum(shares) for share in shares]


@pytest.mark.parametrize("cls", [MoeLoraConfig, MoeEsftConfig])
@pytest.mark.filterwarnings("ignore:no experts are chosen")
def test_choices_that_contradict_each_other_are_told(cls):
    chosen = {ENCODER: [0, 1], DECODER: [2]}
    with pytest.raises(ConfigError, match=rf"\[0, 1\] of '{ENCODER}' and \[2\] of '{DECODER}', which have the same"):
        used(cls(selected_experts=chosen, moe_target=["experts"]))


@pytest.mark.filterwarnings("ignore:no experts are chosen")
def test_the_same_choice_may_be_said_once_or_twice():
    once = used(MoeLoraConfig(selected_experts={ENCODER: [1, 0]})).selected_experts
    twice = used(MoeLoraConfig(selected_experts={ENCODER: [0, 1], DECODER: [1, 0]})).selected_experts
    assert once == twice == {ENCODER: [0, 1], DECODER: [0, 1]}


@pytest.mark.parametrize(("tokens", "expected"), [((90, 10), [0]), ((10, 90), [3]), ((50, 50), [5])])
def test_the_use_by_all_routers_decides(tokens, expected, tmp_path):
    """Each router alone uses another expert most; the third is the second of both."""
    encoder, decoder = shares_of(0, 5, 6), shares_of(3, 5, 7)
    shares = {"encoder.0": encoder, "decoder.0": decoder, "encoder.1": encoder, "decoder.1": decoder}
    seen = {label: tokens[label.startswith("decoder")] for label in shares}
    path = tmp_path / "profile.json"
    selection = save_profile(build("diffusion_gemma"), "diffusion_gemma", path, shares, **seen)
    config = used(MoeLoraConfig(r=4, expert_selection=selection, experts_per_layer=1, expert_rank="by_share"))
    assert config.selected_experts[ENCODER] == config.selected_experts[DECODER] == expected


def test_ranks_by_share_are_the_same_for_all_names(tmp_path):
    encoder, decoder = shares_of(0, 5, 6), shares_of(3, 5, 7)
    shares = {"encoder.0": encoder, "decoder.0": decoder, "encoder.1": encoder, "decoder.1": decoder}
    selection = save_profile(build("diffusion_gemma"), "diffusion_gemma", tmp_path / "p.json", shares)
    ranks = used(MoeLoraConfig(r=4, expert_selection=selection, expert_rank="by_share")).to_dict()["rank_pattern"]
    by_name = [[ranks[f"{name}.{expert}"] for expert in range(NUM_EXPERTS)] for name in (ENCODER, DECODER)]
    assert by_name[0] == by_name[1]
    assert min(by_name[0][expert] for expert in (0, 3, 5)) > by_name[0][1]


def test_ranks_that_contradict_each_other_are_told():
    with pytest.raises(ConfigError, match=rf"experts of '{DECODER}' and '{ENCODER}' different ranks"):
        used(MoeLoraConfig(r=4, rank_pattern={f"{ENCODER}.2": 8}))


def test_use_counts_by_choices_and_weights_by_tokens():
    profile = profile_of([1.0, 0.0], [0.0, 1.0], [0.5, 0.5])
    first, second, third = profile.layers
    layers = (replace(first, tokens=300, top_k=1), replace(second, tokens=100, gate_score=(0.2, 0.8)), third)
    (name, other), alone = ([layer.experts[0] for layer in layers[:2]], third.experts[0])
    experts = nn.Linear(2, 2)
    tied = TiedNames({name: experts, other: experts, alone: nn.Linear(2, 2)})
    uses = uses_of_modules(replace(profile, layers=layers), tied)
    assert uses.keys() == {name, other, alone}
    assert uses[name] == uses[other]
    assert uses[name].token_share == pytest.approx((300 / 500, 200 / 500))
    assert uses[name].gate_score == pytest.approx((320 / 400, 80 / 400))
    assert uses[alone] == third
