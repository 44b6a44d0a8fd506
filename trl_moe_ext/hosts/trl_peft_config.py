"""From TRL's command-line arguments to the configuration of an adapter of this package."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_moe_ext.errors import ConfigError, PluginError
from trl_moe_ext.hosts.peft import register
from trl_moe_ext.hosts.trl_arguments import CONFIG_FIELDS, MoeModelConfig
from trl_moe_ext.hosts.tuner_types import TUNERS
from trl_moe_ext.plugins import host

if TYPE_CHECKING:
    from trl_moe_ext.tuners.targets.options import TargetOptions

__all__ = ["adapter_config", "in_words_of_the_command"]

# A field of a config in a message, and not the option of the command line that is called the same.
_FIELD = re.compile(r"(?<![\w-])(" + "|".join(name for name in CONFIG_FIELDS.values() if "_" in name) + r")(?!\w)")
_OPTION_OF = {name: option for option, name in CONFIG_FIELDS.items()}


def adapter_config(model_args: MoeModelConfig) -> TargetOptions:
    """What `trl.get_peft_config` returns for an adapter of ours: the `--lora_*` options, then the `--moe_*` ones.

    Raises:
        ConfigError: an option, or a combination of options, that the configuration of the adapter refuses, or a
            profile that cannot be read.
        HostVersionError: PEFT is not one that our types can be registered with.
    """
    register()  # done already unless autoload is off
    if model_args.moe_kernel is not None:
        _check_kernel(model_args.moe_kernel)
    tuner = next(tuner for tuner in TUNERS if tuner.option == model_args.peft_type)
    config_cls = getattr(import_module(tuner.package), tuner.config)
    known = {option.name for option in fields(config_cls)}
    options = {name: value for name, value in _options(model_args).items() if name in known}
    try:
        config: TargetOptions = config_cls(**options)
    except ValueError as error:  # ours, and those of PEFT on options that contradict each other
        raise ConfigError(in_words_of_the_command(str(error))) from error
    _check_profile(config)
    return config


def _options(model_args: MoeModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "task_type": model_args.lora_task_type,
        "r": model_args.lora_r,
        "lora_alpha": model_args.lora_alpha,
        "lora_dropout": model_args.lora_dropout,
        "target_modules": _names_or_pattern(model_args.lora_target_modules),
        "modules_to_save": model_args.lora_modules_to_save,
        "use_rslora": model_args.use_rslora,
        "use_dora": model_args.use_dora,
    }
    if model_args.lora_target_parameters is not None:
        options["target_parameters"] = model_args.lora_target_parameters
    for option, name in CONFIG_FIELDS.items():
        value = getattr(model_args, option)
        if value is not None:
            options[name] = value
    return options | {"exclude_modules": _names_or_pattern(model_args.moe_exclude_modules)}


def _check_kernel(name: str) -> None:
    """The tuner looks the kernel up when it meets the first experts, which is after the model has been loaded."""
    try:
        host().lookup("register_kernels", name)
    except PluginError as error:
        raise ConfigError(f"--moe_kernel {name} is unknown: {error}") from error


def _check_profile(config: TargetOptions) -> None:
    """The tuner reads the profile when it has the model, which it compares it with."""
    if config.profile_path is not None:
        from trl_moe_ext.tuners.selection.profiled import load_profile

        load_profile(config.profile_path)


def in_words_of_the_command(message: str) -> str:
    """``expert_coverage=2`` as ``--moe_expert_coverage=2``, which is what was typed."""
    return _FIELD.sub(lambda found: f"--{_OPTION_OF[found[1]]}", message)


def _names_or_pattern(names: str | list[str] | None) -> str | list[str] | None:
    """PEFT takes a list as names of modules and a string as a regular expression for their full names.

    `ModelConfig` turns a list of one into a string, so that ``q_proj`` would be an expression that matches nothing. A
    single word is a name here; anything else that comes alone, ``all-linear`` too, goes to PEFT as a string.
    """
    if isinstance(names, list) and len(names) == 1:
        names = names[0]
    if isinstance(names, str):
        return [names] if re.fullmatch(r"[\w.]+", names) else names
    return names
