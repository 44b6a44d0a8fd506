"""`MoeModelConfig`: what each option becomes, and every combination that is refused."""

from __future__ import annotations

import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl import ModelConfig

from tests.profiles.made import profile_of
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.hosts.trl_arguments import CONFIG_FIELDS, MoeModelConfig
from trl_moe_ext.hosts.trl_peft_config import adapter_config
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig
from trl_moe_ext.tuners.moe_lora import MoeLoraConfig


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """A profile, as `--moe_expert_selection` names it."""
    profile_of((0.4, 0.3, 0.2, 0.1)).save(tmp_path / "profile.json")
    return f"profile:{tmp_path / 'profile.json'}"


def config_of(**options: Any) -> MoeLoraConfig:
    config = adapter_config(MoeModelConfig(peft_type="moe_lora", **options))
    assert type(config) is MoeLoraConfig
    return config


def test_every_option_reaches_the_config(profile: str) -> None:
    given = {
        "lora_r": 5,
        "lora_alpha": 7,
        "lora_dropout": 0.25,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_modules_to_save": ["score"],
        "lora_task_type": "SEQ_CLS",
        "use_rslora": True,
        "moe_target": ["experts", "router"],
        "moe_expert_r": 3,
        "moe_expert_alpha": 1.5,
        "moe_expert_rank": "by_share",
        "moe_expert_projections": "down",
        "moe_expert_selection": profile,
        "moe_expert_coverage": 0.5,
        "moe_expert_score": "gate_score",
        "moe_kernel": "fused",
        "moe_save_activations": "none",
        "moe_layers_to_transform": [0, 2],
        "moe_exclude_modules": ["visual", "lm_head"],
        "moe_router_bias": True,
        "router_mode": "lora",
    }
    # Which says the same as the coverage, in another way.
    assert set(CONFIG_FIELDS) <= {*given, "moe_experts_per_layer"}
    assert config_of(moe_expert_selection=profile, moe_experts_per_layer=3).experts_per_layer == 3
    config = config_of(**given)
    # PEFT keeps names of modules as sets.
    expected = {
        "r": 5,
        "lora_alpha": 7,
        "lora_dropout": 0.25,
        "target_modules": {"q_proj", "v_proj"},
        "modules_to_save": ["score"],
        "task_type": "SEQ_CLS",
        "use_rslora": True,
        "moe_target": ["experts", "router"],
        "expert_r": 3,
        "expert_alpha": 1.5,
        "expert_rank": "by_share",
        "expert_projections": "down",
        "expert_selection": profile,
        "expert_coverage": 0.5,
        "expert_score": "gate_score",
        "kernel": "fused",
        "save_activations": "none",
        "layers_to_transform": [0, 2],
        "exclude_modules": {"visual", "lm_head"},
        "router_bias": True,
        "router_mode": "lora",
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_what_is_not_given_is_the_default_of_the_tuner() -> None:
    config, default = config_of(), MoeLoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05)
    assert config.to_dict() == default.to_dict()
    assert config.kernel == default.kernel


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["q_proj"], {"q_proj"}),
        ("q_proj", {"q_proj"}),
        (["self_attn.q_proj"], {"self_attn.q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
        (["all-linear"], "all-linear"),
        (None, None),
    ],
)
def test_one_word_is_a_name_and_not_a_regular_expression(given: Any, expected: Any) -> None:
    assert config_of(lora_target_modules=given).target_modules == expected
    assert config_of(moe_exclude_modules=given).exclude_modules == expected


@pytest.mark.parametrize("spelling", ["moe_lora", "MOE_LORA"])
def test_peft_type_implies_use_peft(spelling: str) -> None:
    arguments = MoeModelConfig(peft_type=spelling)
    assert (arguments.peft_type, arguments.use_peft) == ("moe_lora", True)


def test_a_single_value_is_a_list_of_one() -> None:
    arguments = MoeModelConfig(peft_type="moe_lora", moe_target="experts", moe_layers_to_transform=1)
    assert (arguments.moe_target, arguments.moe_layers_to_transform) == (["experts"], [1])


def test_no_bias_is_the_same_as_not_asking_for_one() -> None:
    """As a YAML file may say it, with stock LoRA too."""
    assert MoeModelConfig(moe_router_bias=False).as_stock() == ModelConfig()
    assert not config_of(moe_router_bias=False).router_bias


def test_as_stock_keeps_all_that_trl_knows() -> None:
    stock = MoeModelConfig(lora_r=3, lora_target_modules=["q"], use_peft=True).as_stock()
    assert type(stock) is ModelConfig
    assert stock == ModelConfig(lora_r=3, lora_target_modules=["q"], use_peft=True)


def test_what_reaches_the_config_of_moe_esft(profile: str) -> None:
    """The options that have a meaning there, and of the others none."""
    given = {
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_modules_to_save": ["score"],
        "lora_task_type": "SEQ_CLS",
        "moe_target": ["experts", "attention"],
        "moe_expert_projections": "down",
        "moe_expert_selection": profile,
        "moe_experts_per_layer": 2,
        "moe_expert_score": "gate_score",
        "moe_layers_to_transform": [0, 2],
        "moe_exclude_modules": ["visual", "lm_head"],
    }
    config = adapter_config(MoeModelConfig(peft_type="moe_esft", **given))
    expected = {
        "target_modules": {"q_proj", "v_proj"},
        "modules_to_save": ["score"],
        "task_type": "SEQ_CLS",
        "moe_target": ["experts", "attention"],
        "expert_projections": "down",
        "expert_selection": profile,
        "experts_per_layer": 2,
        "expert_score": "gate_score",
        "layers_to_transform": [0, 2],
        "exclude_modules": {"visual", "lm_head"},
    }
    assert type(config) is MoeEsftConfig
    assert {name: getattr(config, name) for name in expected} == expected
    by_coverage = MoeModelConfig(peft_type="moe_esft", moe_expert_selection=profile, moe_expert_coverage=0.5)
    assert adapter_config(by_coverage).expert_coverage == 0.5


def test_every_option_reaches_moe_esft_or_is_refused() -> None:
    known = {option.name for option in fields(MoeEsftConfig)}
    no_field = [option for option, name in CONFIG_FIELDS.items() if name not in known]
    assert no_field
    for option in no_field:
        value = True if option == "moe_router_bias" else 3
        with pytest.raises(ConfigError, match=rf"--{option} has no effect with --peft_type moe_esft"):
            MoeModelConfig(peft_type="moe_esft", moe_expert_selection="all", **{option: value})


def test_options_of_lora_that_always_have_a_value_are_told_to_be_ignored() -> None:
    with pytest.warns(UserWarning, match="--lora_r, --lora_dropout: no effect with --peft_type moe_esft"):
        MoeModelConfig(peft_type="moe_esft", moe_expert_selection="all", lora_r=3, lora_dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MoeModelConfig(peft_type="moe_esft", moe_expert_selection="all")


# Options, and what the message must say: what is wrong, and the way out.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "moe_lra"}, "moe_lra is unknown; did you mean moe_lora"),
    ({"peft_type": 3}, "3 is unknown; known: lora, moe_esft, moe_lora"),
    ({"moe_expert_r": 4}, "--moe_expert_r: no effect, because --peft_type is not given; .* leave it out"),
    ({"moe_expert_r": 0}, "--moe_expert_r: no effect"),
    ({"use_peft": True, "moe_target": ["experts"]}, "--moe_target: no effect, because --peft_type is not given"),
    (
        {"peft_type": "lora", "moe_expert_r": 4, "moe_kernel": "grouped"},
        "--moe_expert_r, --moe_kernel: no effect, because --peft_type is lora; .* leave them out",
    ),
    ({"peft_type": "moe_lora", "use_dora": True}, "--use_dora .* leave it out, or use --peft_type lora"),
    ({"peft_type": "moe_lora", "lora_r": 0}, "--lora_r is 0, .* whole number of at least 1"),
    ({"peft_type": "lora", "lora_r": -2}, "--lora_r is -2"),
    ({"peft_type": "moe_lora", "moe_expert_r": 0}, "--moe_expert_r is 0"),
    ({"peft_type": "moe_lora", "moe_expert_r": 2.0}, r"--moe_expert_r is 2\.0"),
    ({"peft_type": "moe_lora", "moe_expert_r": True}, "--moe_expert_r is True"),
    ({"peft_type": "moe_lora", "moe_expert_alpha": 0}, "--moe_expert_alpha is 0, .* number above 0"),
    ({"peft_type": "moe_lora", "moe_expert_alpha": "much"}, "--moe_expert_alpha is 'much'"),
    ({"peft_type": "moe_lora", "moe_layers_to_transform": []}, "--moe_layers_to_transform .* leave it out"),
    ({"peft_type": "moe_lora", "moe_layers_to_transform": [0, -1]}, "layer indices from 0"),
    ({"peft_type": "moe_lora", "moe_target": []}, r"--moe_target is \[\]; use one or more names"),
    ({"peft_type": "moe_lora", "moe_exclude_modules": [1]}, r"--moe_exclude_modules is \[1\]"),
    ({"router_mode": "full"}, "--router_mode: no effect, because --peft_type is not given; .* leave it out"),
    (
        {"peft_type": "lora", "moe_router_bias": True, "router_mode": "lora"},
        "--moe_router_bias, --router_mode: no effect, because --peft_type is lora; .* leave them out",
    ),
    # What only the config or the plug-ins can tell.
    ({"peft_type": "moe_lora", "router_mode": "ful"}, "--router_mode: 'ful' is unknown; did you mean full"),
    (
        {"peft_type": "moe_lora", "router_mode": "full", "moe_target": ["experts", "router"]},
        "--router_mode='full' contradicts 'router' in --moe_target, .* use --router_mode='lora'",
    ),
    (
        {"peft_type": "moe_lora", "moe_router_bias": True, "moe_target": ["attention"]},
        "--moe_router_bias has no effect: .* add 'experts' to --moe_target",
    ),
    ({"peft_type": "moe_lora", "moe_target": ["expert"]}, "'expert' is unknown; did you mean experts"),
    ({"peft_type": "moe_lora", "moe_expert_projections": "up"}, "--moe_expert_projections: 'up' is unknown"),
    (
        {"peft_type": "moe_lora", "moe_expert_selection": "profile:nowhere.json", "moe_expert_coverage": 0.5},
        "nowhere.json does not exist; make it with: trl-moe profile MODEL",
    ),
    (
        {"peft_type": "moe_lora", "moe_expert_selection": f"profile:{__file__}", "moe_experts_per_layer": 2},
        "is not a profile of experts",
    ),
    (
        {"peft_type": "moe_lora", "moe_expert_selection": "profile:p.json"},
        "--moe_expert_selection='profile:p.json' does not say how many experts; add --moe_expert_coverage",
    ),
    ({"peft_type": "moe_lora", "moe_expert_selection": "some"}, "--moe_expert_selection='some' is unknown; use 'all'"),
    ({"peft_type": "moe_lora", "moe_expert_selection": 3}, "--moe_expert_selection is 3; use 'all'"),
    (
        {"peft_type": "moe_lora", "moe_experts_per_layer": 2},
        "--moe_experts_per_layer=2 has no effect without a profile; add --moe_expert_selection=profile:<file>",
    ),
    (
        {"peft_type": "moe_lora", "moe_expert_rank": "by_share"},
        "--moe_expert_rank='by_share' has no effect without a profile",
    ),
    ({"peft_type": "moe_lora", "moe_expert_rank": "share"}, "--moe_expert_rank: 'share' is unknown; .*by_share"),
    ({"peft_type": "moe_lora", "moe_expert_score": "gates"}, "--moe_expert_score='gates' is unknown; .*gate_score"),
    (
        {"moe_expert_coverage": 0.5, "moe_expert_score": "gate_score"},
        "--moe_expert_coverage, --moe_expert_score: no effect, because --peft_type is not given",
    ),
    ({"peft_type": "moe_esft"}, "--moe_expert_selection is not given: say profile:<file>"),
    ({"peft_type": "moe_esft", "use_dora": True}, "--use_dora has no effect with .* low-rank.*leave it out"),
    ({"peft_type": "moe_esft", "use_rslora": True}, "--use_rslora has no effect with --peft_type moe_esft"),
    ({"peft_type": "moe_esft", "lora_target_parameters": ["w"]}, "--lora_target_parameters has no effect"),
    (
        {"peft_type": "moe_esft", "router_mode": "lora"},
        "--router_mode has no effect .* in --lora_modules_to_save",
    ),
    (
        {"peft_type": "moe_esft", "moe_expert_selection": "profile:nowhere.json", "moe_experts_per_layer": 2},
        "nowhere.json does not exist; make it with: trl-moe profile MODEL",
    ),
    ({"peft_type": "moe_lora", "moe_kernel": "group"}, "--moe_kernel group is unknown: .*grouped"),
    ({"peft_type": "moe_lora", "lora_dropout": 1.5}, "lora_dropout=1.5"),
    (
        {"peft_type": "moe_lora", "lora_target_modules": ["all.*"], "moe_layers_to_transform": [0]},
        "layers_to_transform",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapter_config(MoeModelConfig(**options))
