"""From TRL's command-line arguments to a `MoeLoraConfig`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from trl_moe_ext.errors import ConfigError, PluginError
from trl_moe_ext.hosts.peft import register
from trl_moe_ext.hosts.trl_arguments import CONFIG_FIELDS, MoeModelConfig
from trl_moe_ext.plugins import host

if TYPE_CHECKING:
    from trl_moe_ext.tuners.moe_lora import MoeLoraConfig

__all__ = ["moe_lora_config"]


def moe_lora_config(model_args: MoeModelConfig) -> MoeLoraConfig:
    """What `trl.get_peft_config` returns for `--peft_type moe_lora`: the `--lora_*` options, then the `--moe_*` ones.

    Raises:
        ConfigError: an option, or a combination of options, that `MoeLoraConfig` refuses.
        HostVersionError: PEFT is not one that MOE_LORA can be registered with.
    """
    register()  # done already unless autoload is off
    from trl_moe_ext.tuners.moe_lora import MoeLoraConfig

    if model_args.moe_kernel is not None:
        _check_kernel(model_args.moe_kernel)
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
    options["exclude_modules"] = _names_or_pattern(model_args.moe_exclude_modules)
    try:
        return MoeLoraConfig(**options)
    except ValueError as error:  # ours, and those of LoraConfig on options that contradict each other
        raise ConfigError(str(error)) from error


def _check_kernel(name: str) -> None:
    """The tuner looks the kernel up when it meets the first experts, which is after the model has been loaded."""
    try:
        host().lookup("register_kernels", name)
    except PluginError as error:
        raise ConfigError(f"--moe_kernel {name} is unknown: {error}") from error


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
