"""`--router_*` of `trl sft`: help, YAML and JSON, errors in one line, and TRL's own options without moe_lora."""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from tests.hosts.refusals import only_line_of
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.sft.config import ROUTER_OPTIONS, MoeSFTConfig

OTHER_COMMANDS = ["distillation", "dpo", "grpo", "kto", "reward", "rloo"]
CPU = ["--use_cpu", "--bf16", "false", "--output_dir", "out"]
MOE_LORA = [*CPU, "--peft_type", "moe_lora"]

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


class StockParser(TrlParser):
    """Classes derived from TRL's are left alone."""


def parse(words: list[str], parser: type[TrlParser] = TrlParser, **options: Any) -> Any:
    """The arguments of training, parsed as the script does it."""
    made = parser((ScriptArguments, SFTConfig, ModelConfig), prog="trl sft")
    return made.parse_args_and_config(words, **options)[1]


def in_yaml(folder: Path, settings: dict[str, Any]) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"use_cpu": True, "bf16": False, "output_dir": "out", **settings}))
    return ["--config", str(path)]


def saved(args: Any) -> bytes:
    """As in training_args.bin."""
    file = io.BytesIO()
    torch.save(args, file)
    return file.getvalue()


def parser_of(command: str) -> Any:
    return importlib.import_module(f"trl.scripts.{command}").make_parser(prog=f"trl {command}")


def test_help_lists_every_option() -> None:
    text = " ".join(parser_of("sft").format_help().split())
    for option in ROUTER_OPTIONS:
        assert f"--{option} " in text
    assert "--router_metrics {off,summary,full}" in text
    assert "--router_counts {exact,running}" in text


@pytest.mark.parametrize("command", OTHER_COMMANDS)
def test_other_commands_have_none_of_them(command: str) -> None:
    options = {action.dest for action in parser_of(command)._actions}
    assert "moe_target" in options
    assert not options & {*ROUTER_OPTIONS}


def test_flags_json_and_yaml_give_the_same(tmp_path: Path) -> None:
    flags = [
        *("--router_aux_loss_coef", "0.01", "--router_losses", '{"z_loss": 0.001, "drift_kl": 0.5}'),
        *("--router_learning_rate", "1e-3", "--router_counts", "running", "--router_metrics", "full"),
    ]
    settings = {
        "peft_type": "moe_lora",
        "router_aux_loss_coef": 0.01,
        "router_losses": {"z_loss": 0.001, "drift_kl": 0.5},
        "router_learning_rate": 0.001,
        "router_counts": "running",
        "router_metrics": "full",
    }
    from_flags = parse([*MOE_LORA, *flags])
    assert type(from_flags) is MoeSFTConfig
    assert from_flags.router_losses == {"z_loss": 0.001, "drift_kl": 0.5}
    for other in (
        parse(in_yaml(tmp_path, settings)),
        parse(in_yaml(tmp_path, settings | {"router_losses": '{"z_loss": 0.001, "drift_kl": 0.5}'})),
        parse([*MOE_LORA, *(word.replace("_", "-") if word.startswith("--router") else word for word in flags)]),
    ):
        assert type(other) is MoeSFTConfig
        assert other.to_dict() == from_flags.to_dict()


def test_moe_esft_has_them_too() -> None:
    adapter = ["--peft_type", "moe_esft", "--moe_expert_selection", "all"]
    args = parse([*CPU, *adapter, "--router_metrics", "full"])
    assert type(args) is MoeSFTConfig
    assert args.router_metrics == "full"


def test_numbers_that_yaml_takes_for_strings(tmp_path: Path) -> None:
    """PyYAML wants a point in 1e-3."""
    path = tmp_path / "config.yaml"
    path.write_text("router_losses: {z_loss: 1e-3}\nrouter_learning_rate: 1e-3\nrouter_aux_loss_coef: 1e-2\n")
    args = parse([*MOE_LORA, "--config", str(path)])
    assert (args.router_losses, args.router_learning_rate) == ({"z_loss": 0.001}, 0.001)
    assert args.router_aux_loss_coef == 0.01


@pytest.mark.parametrize("words", [[], ["--use_peft"], ["--peft_type", "lora"]], ids=["none", "use_peft", "lora"])
def test_without_moe_lora_all_is_stock(words: list[str], tmp_path: Path) -> None:
    words = [*CPU, *words, "--router_aux_loss_coef", "0.01"]
    ours = parse(words)
    stock = parse([word for word in words if word not in ("--peft_type", "lora")], StockParser)
    assert type(ours) is SFTConfig
    assert ours.to_dict() == stock.to_dict()
    assert list(vars(ours)) == list(vars(stock))
    assert saved(ours) == saved(stock)


def test_a_parser_that_is_used_twice() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    kinds = [type(parser.parse_args_and_config(words)[1]) for words in (CPU, MOE_LORA, CPU)]
    assert kinds == [SFTConfig, MoeSFTConfig, SFTConfig]


def test_parse_dict() -> None:
    parser = TrlParser((SFTConfig, ModelConfig))
    common = {"use_cpu": True, "bf16": False, "output_dir": "out"}
    args, _ = parser.parse_dict({**common, "peft_type": "moe_lora", "router_metrics": "full"})
    assert (type(args), args.router_metrics) == (MoeSFTConfig, "full")
    assert type(parser.parse_dict(common)[0]) is SFTConfig
    with pytest.raises(ConfigError, match="--router_metrics: no effect, because --peft_type is not given"):
        parser.parse_dict({**common, "router_metrics": "full"})


def error_of(words: list[str], capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    return only_line_of(capsys, lambda: parse(words, **options))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--router_metrics", "ful"], "router_metrics='ful' is unknown; did you mean full"),
        (["--router_counts", "exactly"], "router_counts='exactly' is unknown; did you mean exact"),
        (["--router_losses", '{"z_los": 1}'], "register_router_losses has no 'z_los'; did you mean z_loss"),
        (["--router_losses", '{"z_loss": -1}'], "router_losses: the coefficient of z_loss is -1; use a number from 0"),
        (["--router_losses", '{"z_loss": "x"}'], "router_losses: the coefficient of z_loss is 'x'"),
        (["--router_losses", '{"z_loss": true}'], "router_losses: the coefficient of z_loss is True"),
        (["--router_losses", '{"z_loss": 1'], "router_losses='{\"z_loss\": 1' is not JSON"),
        (["--router_losses", "z_loss"], "router_losses='z_loss' is not JSON"),
        (["--router_losses", "[1]"], "router_losses=[1] is not a mapping"),
        (["--router_losses", '{"load_balancing": 1}'], "router_losses: load_balancing has an option of its own"),
        (["--router_aux_loss_coef", "-0.1"], "router_aux_loss_coef=-0.1 is not a number of at least 0"),
        (["--router_learning_rate", "nan"], "router_learning_rate=nan is not a number of at least 0"),
        (["--router_learning_rate", "fast"], "argument --router_learning_rate/--router-learning-rate: invalid float"),
        (["--router_loses", '{"z_loss": 1}'], "--router_loses is unknown; did you mean router_losses"),
        (["--router_metric=full"], None),
    ],
)
@pytest.mark.parametrize("in_parent", [True, False], ids=["parent", "script"])
def test_errors_are_one_line(
    words: list[str], message: str | None, in_parent: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*MOE_LORA, *words]
    if message is None:  # an abbreviation, which argparse takes
        assert parse(words, return_remaining_strings=in_parent).router_metrics == "full"
        return
    error = error_of(words, capsys, return_remaining_strings=in_parent)
    assert error.startswith(f"trl sft: error: {message}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_losses": {"z_los": 1}}, "register_router_losses has no 'z_los'; did you mean z_loss"),
        ({"router_losses": ["z_loss"]}, "router_losses=['z_loss'] is not a mapping"),
        ({"router_metrics": "ful"}, "router_metrics='ful' is unknown"),
        ({"router_metrics": False}, "router_metrics=False is unknown"),
        ({"router_loses": {"z_loss": 1}}, "--router_loses is unknown; did you mean router_losses"),
    ],
)
def test_errors_in_yaml(
    settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = in_yaml(tmp_path, {"peft_type": "moe_lora", **settings})
    assert error_of(words, capsys, fail_with_unknown_args=False).startswith(f"trl sft: error: {message}")


@pytest.mark.parametrize("words", [[], ["--use_peft"], ["--peft_type", "lora"]], ids=["none", "use_peft", "lora"])
def test_options_without_moe_lora_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = "--peft_type is lora" if "lora" in words else "--peft_type is not given"
    message = f"no effect, because {found}; use --peft_type moe_lora, or leave"
    error = error_of([*CPU, *words, "--router_metrics", "full"], capsys)
    assert error == f"trl sft: error: --router_metrics: {message} it out\n"
    error = error_of(
        [*words, *in_yaml(tmp_path, {"router_losses": {"z_loss": 1}, "router_counts": "running"})], capsys
    )
    assert error == f"trl sft: error: --router_losses, --router_counts: {message} them out\n"
