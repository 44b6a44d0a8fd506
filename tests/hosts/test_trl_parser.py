"""`--peft_type` and `--moe_*` on TRL's own parsers: help, YAML, errors, and what stays stock."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import trl
import trl.trainer.model_config
import trl.trainer.utils
import yaml
from peft import LoraConfig
from trl import ModelConfig, ScriptArguments, TrlParser

from tests.hosts.refusals import only_line_of
from tests.profiles.made import profile_of
from trl_moe_ext.errors import ConfigError, HostVersionError
from trl_moe_ext.hosts.trl import install_parser
from trl_moe_ext.hosts.trl_arguments import CONFIG_FIELDS, MoeModelConfig
from trl_moe_ext.hosts.trl_parser import MoeTrlParser
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig
from trl_moe_ext.tuners.moe_lora import MoeLoraConfig

COMMANDS = ["distillation", "dpo", "grpo", "kto", "reward", "rloo", "sft"]
OPTIONS = ["peft_type", *CONFIG_FIELDS]


@functools.cache
def help_of(command: str) -> str:
    parser = importlib.import_module(f"trl.scripts.{command}").make_parser(prog=f"trl {command}")
    return str(parser.format_help())


def parse(arguments: str | list[str], **kwargs: Any) -> Any:
    """The model arguments, parsed as the scripts do it."""
    words = arguments.split() if isinstance(arguments, str) else arguments
    parser = TrlParser((ScriptArguments, ModelConfig), prog="trl sft")
    return parser.parse_args_and_config(words, **kwargs)[1]


def parse_yaml(settings: dict[str, Any], folder: Path, arguments: str = "", **kwargs: Any) -> Any:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return parse(f"--config {path} {arguments}", **kwargs)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option(command: str) -> None:
    text = " ".join(help_of(command).split())
    for option in OPTIONS:
        assert f"--{option} " in text
    assert "'moe_lora' is LoRA on the routed experts" in text
    assert "'moe_esft' trains the weights of chosen experts" in text
    assert "--peft_type {lora,moe_lora,moe_esft}" in text
    assert "--moe_expert_projections {both,gate_up,down}" in text


def test_all_training_commands_are_tested() -> None:
    from trl.cli.commands import get_commands
    from trl.cli.commands.training import TrainingCommand

    assert [command.name for command in get_commands() if isinstance(command, TrainingCommand)] == COMMANDS


def test_yaml_and_flags_give_the_same(tmp_path: Path) -> None:
    profile_of((0.4, 0.3, 0.2, 0.1)).save(tmp_path / "profile.json")
    settings = {
        "peft_type": "moe_lora",
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "o_proj"],
        "moe_target": ["experts", "router"],
        "moe_expert_r": 2,
        "moe_expert_alpha": 3.5,
        "moe_expert_rank": "by_share",
        "moe_expert_projections": "gate_up",
        "moe_expert_selection": f"profile:{tmp_path / 'profile.json'}",
        "moe_expert_coverage": 0.75,
        "moe_expert_score": "gate_score",
        "moe_kernel": "fused",
        "moe_save_activations": "none",
        "moe_layers_to_transform": [0, 1],
        "moe_exclude_modules": ["visual", "lm_head"],
        "moe_router_bias": True,
        "router_mode": "lora",
    }
    assert set(OPTIONS) <= {*settings, "moe_experts_per_layer"}  # which goes without a coverage
    words = []
    for option, value in settings.items():
        words += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    flags = parse(words)
    assert flags == parse_yaml(settings, tmp_path)
    assert flags == parse([word.replace("_", "-") if word.startswith("--") else word for word in words])
    assert flags.moe_expert_alpha == 3.5
    assert trl.get_peft_config(flags).expert_alpha == 3.5


def test_yaml_with_single_values(tmp_path: Path) -> None:
    settings = {"peft_type": "moe_lora", "moe_target": "experts", "moe_layers_to_transform": 1}
    assert parse_yaml(settings, tmp_path) == parse(
        "--peft_type moe_lora --moe_target experts --moe_layers_to_transform 1"
    )


def test_a_flag_goes_before_yaml(tmp_path: Path) -> None:
    settings = {"peft_type": "moe_lora", "moe_expert_r": 2}
    assert parse_yaml(settings, tmp_path, "--moe_expert_r 5").moe_expert_r == 5


@pytest.mark.parametrize("place", [trl, trl.trainer, trl.trainer.utils], ids=lambda place: place.__name__)
def test_get_peft_config(place: Any) -> None:
    config = place.get_peft_config(parse("--peft_type moe_lora --lora_r 3 --moe_target experts"))
    assert type(config) is MoeLoraConfig
    assert (config.r, config.moe_target) == (3, ["experts"])


def test_get_peft_config_of_moe_esft() -> None:
    config = trl.get_peft_config(parse("--peft_type moe_esft --moe_expert_selection all --moe_target experts router"))
    assert type(config) is MoeEsftConfig
    assert (config.expert_selection, config.moe_target) == ("all", ["experts", "router"])


@pytest.mark.parametrize("arguments", ["", "--use_peft", "--use_peft --lora_r 3 --lora_target_modules q_proj"])
def test_without_peft_type_all_is_stock(arguments: str) -> None:
    parsed = parse(arguments)
    assert type(parsed) is ModelConfig
    assert vars(parsed).keys() == {option.name for option in fields(ModelConfig)}
    stock = trl.get_peft_config.__wrapped__(parsed)
    assert trl.get_peft_config(parsed) == stock
    assert type(stock) is (LoraConfig if arguments else type(None))


def test_peft_type_lora_is_use_peft() -> None:
    assert parse("--peft_type lora --lora_r 3") == parse("--use_peft --lora_r 3")
    assert type(parse("--peft_type lora")) is ModelConfig


def test_parse_dict() -> None:
    parser = TrlParser(ModelConfig)
    assert type(parser.parse_dict({"use_peft": True})[0]) is ModelConfig
    assert type(parser.parse_dict({"peft_type": "moe_lora"})[0]) is MoeModelConfig
    with pytest.raises(ConfigError, match="--moe_target: 'expert' is unknown"):
        parser.parse_dict({"peft_type": "moe_lora", "moe_target": ["expert"]})


def test_parsers_that_are_not_for_us() -> None:
    class Derived(TrlParser):
        pass

    assert type(TrlParser((ScriptArguments,))) is TrlParser
    assert type(TrlParser()) is TrlParser
    assert type(Derived((ModelConfig,))) is Derived
    assert type(TrlParser((ModelConfig,))) is MoeTrlParser
    assert isinstance(TrlParser(ModelConfig), TrlParser)


def error_of(arguments: str, capsys: pytest.CaptureFixture[str], *settings: Any, **kwargs: Any) -> str:
    return only_line_of(
        capsys,
        lambda: parse_yaml(settings[0], settings[1], arguments, **kwargs) if settings else parse(arguments, **kwargs),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--peft_type moe_lra", "--peft_type moe_lra is unknown; did you mean moe_lora"),
        ("--moe_expert_r 4", "--moe_expert_r: no effect"),
        ("--peft_type moe_esft", "--moe_expert_selection is not given"),
        ("--peft_type moe_esft --moe_expert_r 4", "--moe_expert_r has no effect with --peft_type moe_esft"),
        ("--peft_type moe_lora --moe_target expert", "--moe_target: 'expert' is unknown"),
        ("--peft_type moe_lora --moe_expert_selection al", "--moe_expert_selection='al' is unknown; use 'all'"),
        (
            "--peft_type moe_lora --moe_expert_selection profile:nowhere.json --moe_experts_per_layer 2",
            "nowhere.json does not exist; make it with: trl-moe profile",
        ),
        ("--peft_type moe_lora --moe_expert_r four", "argument --moe_expert_r/--moe-expert-r: invalid int value"),
        ("--peft_type moe_lora --moe_target", "argument --moe_target/--moe-target: expected at least one argument"),
        ("--peft_type moe_lora --moe_expert 4", "ambiguous option: --moe_expert could match"),
        ("--peft_type moe_lora --moe_experts_r 4", "--moe_experts_r is unknown; did you mean moe_expert_r"),
        ("--peft-typ=moe_lora --peft-tipe=moe_lora", "--peft_tipe is unknown; did you mean peft_type"),
    ],
)
@pytest.mark.parametrize("in_parent", [True, False], ids=["parent", "script"])
def test_errors_are_one_line(
    arguments: str, message: str, in_parent: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert error_of(arguments, capsys, return_remaining_strings=in_parent).startswith(f"trl sft: error: {message}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "moe_lra"}, "--peft_type moe_lra is unknown"),
        ({"peft_type": "moe_lora", "moe_expert_r": "four"}, "argument --moe_expert_r/--moe-expert-r: invalid int"),
        ({"peft_type": "moe_lora", "moe_expert_r": 1.5}, "--moe_expert_r is 1.5"),
        ({"peft_type": "moe_lora", "moe_experts_r": 4}, "--moe_experts_r is unknown; did you mean moe_expert_r"),
        ({"peft_type": "moe_lora", "moe-expert-r": 4}, "--moe_expert_r is unknown; did you mean moe_expert_r"),
    ],
)
def test_errors_in_yaml(
    settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of("", capsys, settings, tmp_path, fail_with_unknown_args=False)
    assert error.startswith(f"trl sft: error: {message}")


def test_errors_about_other_options_are_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--lora_r four")
    assert capsys.readouterr().err.startswith("usage: trl sft")
    *_, config_remaining, remaining = TrlParser((ModelConfig,)).parse_args_and_config(
        ["--num_processes", "2"], return_remaining_strings=True, separate_remaining_strings=True
    )
    assert (config_remaining, remaining) == ([], ["--num_processes", "2"])


@pytest.mark.parametrize("replaced", [lambda arguments: None, None], ids=["other parameters", "no function"])
def test_moe_lora_is_refused_where_get_peft_config_cannot_be_wrapped(
    replaced: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Going on would train plain LoRA, with the experts untouched."""
    monkeypatch.setattr(trl.trainer.utils, "get_peft_config", replaced)
    error = error_of("--peft_type moe_lora", capsys)
    assert "trl.trainer.utils:get_peft_config does not take model_args" in error
    assert f"trl {trl.__version__} is not a version" in error
    assert type(parse("--use_peft")) is ModelConfig


def test_model_config_with_an_option_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class LaterModelConfig(ModelConfig):
        peft_type: str | None = None

    before = TrlParser.__new__
    monkeypatch.setattr(trl.trainer.model_config, "ModelConfig", LaterModelConfig)
    with pytest.raises(HostVersionError, match=r"ModelConfig has peft_type of its own"):
        install_parser()
    monkeypatch.setattr(trl.trainer.model_config, "ModelConfig", dataclass(type("Bare", (), {})))
    with pytest.raises(
        HostVersionError, match=r"ModelConfig lacks lora_alpha, lora_dropout, .*use_rslora\. Install trl>=1"
    ):
        install_parser()
    assert TrlParser.__new__ is before
