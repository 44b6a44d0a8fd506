"""The options of `trl-moe async-grpo`: parsed as by the scripts of TRL, and checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from trl_moe_ext.errors import ConfigError, near_matches
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.hosts.trl_arguments import MoeModelConfig
from trl_moe_ext.hosts.trl_parser import MoeTrlParser
from trl_moe_ext.hosts.trl_peft_config import adapter_config

__all__ = ["Arguments", "last_or_path", "model_options", "parse", "peft_config"]

PROGRAM = "trl-moe async-grpo"


@dataclass
class AsyncGRPOScriptArguments(ScriptArguments):  # type: ignore[misc]
    """What is trained on, and what scores it."""

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: names of those of `trl.rewards` that `trl grpo` knows, or dotted paths such as "
            "'my_rewards.right_answer', also of a file in the current directory."
        },
    )


@dataclass
class _TrainingArguments(AsyncMoeGRPOConfig):
    """Without an option `--dtype` of its own: that of the model is meant, which `trl grpo` has as well."""

    dtype: str = field(default="float32", init=False)


class Arguments(NamedTuple):
    """What was given, by whom it is for."""

    script: AsyncGRPOScriptArguments
    training: AsyncMoeGRPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig


def parse(words: Sequence[str]) -> Arguments:
    """Parse a command line, with the YAML file that its `--config` names.

    Raises:
        ConfigError: an option is unknown, wrong or has no effect here, or a file cannot be read.
        SystemExit: the parser has printed its help, or found a mistake itself.
    """
    types = (AsyncGRPOScriptArguments, _TrainingArguments, ModelConfig, DatasetMixtureConfig)
    try:
        arguments = Arguments(*_Parser(types, prog=PROGRAM).parse_args_and_config(list(words)))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config is not YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"--config {error.filename} cannot be read: {error.strerror}") from error
    except ConfigError:
        raise
    except ValueError as error:  # of the checks in the dataclasses of the hosts
        raise ConfigError(str(error)) from error
    _check(arguments)
    arguments.training.dtype = arguments.model.dtype
    return arguments


class _Parser(MoeTrlParser):
    """Says what is wrong in one line, and takes no option that it does not know: no launcher is there for it."""

    def error(self, message: str) -> NoReturn:
        self._refuse(message)

    def _refuse(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def _refuse_unknown(self, remaining: Sequence[str]) -> None:
        if not remaining:
            return
        named = next((word for word in remaining if word.startswith("--")), None)
        if named is None:
            self._refuse(f"{remaining[0]!r} belongs to no option; {_HELP}")
        name = named.partition("=")[0]
        known = [option for action in self._actions for option in action.option_strings if "-" not in option[2:]]
        near = near_matches(name, known)
        # All of them are too many to be listed.
        self._refuse(f"{name} is unknown; {near if near.startswith('did you mean') else _HELP}")


_HELP = f"`{PROGRAM} --help` lists all options"


def _check(arguments: Arguments) -> None:
    model, training = arguments.model, arguments.training
    if not model.model_name_or_path:
        raise ConfigError("--model_name_or_path is not given; add the folder or the name of the model to train")
    if not model.use_peft:
        raise ConfigError(
            "--peft_type is not given, and only an adapter travels to the generator; add --peft_type moe_lora, which "
            "is for routed experts and attention, or --use_peft for PEFT's own LoRA"
        )
    if model.attn_implementation is not None:
        raise ConfigError(
            f"--attn_implementation {model.attn_implementation}: no effect, because samples of one prompt are packed "
            "for an attention of their own; leave it out"
        )
    if model.load_in_4bit or model.load_in_8bit:
        raise ConfigError(
            "--load_in_4bit, --load_in_8bit: the generator does not load quantised weights; leave it out"
        )
    if training.eval_strategy != "no":
        raise ConfigError(
            f"--eval_strategy {training.eval_strategy.value}: there is no evaluation beside the training; leave it out"
        )


def peft_config(model: ModelConfig) -> Any:
    """The config of the adapter: one of ours if its type was asked for, else PEFT's LoRA."""
    if isinstance(model, MoeModelConfig) and model.is_ours:
        return adapter_config(model)
    return get_peft_config(model)


def model_options(arguments: Arguments) -> dict[str, Any]:
    """What the model is loaded with, in the trainer and in the generator."""
    revision = arguments.model.model_revision
    chosen = {} if revision in (None, "main") else {"revision": revision}
    return chosen | dict(arguments.training.model_init_kwargs or {})


def last_or_path(resume: str | bool | None) -> str | bool | None:
    """`--resume_from_checkpoint`: True for the last checkpoint, its folder, or None for none.

    Raises:
        ConfigError: there is no such folder.
    """
    word = str(resume).lower()
    if word in ("none", "false", "no", ""):
        return None
    if word in ("true", "yes", "last"):
        return True
    if not Path(str(resume)).is_dir():
        raise ConfigError(
            f"--resume_from_checkpoint {resume} is not a directory; give a checkpoint of the run, or true for its last"
        )
    return str(resume)
