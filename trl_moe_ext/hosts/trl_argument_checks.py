"""What is wrong with a combination of `--peft_type`, `--moe_*` and `--router_mode`, told before anything is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from trl.trainer.model_config import ModelConfig

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.hosts.trl_peft_type import without_our_adapter

if TYPE_CHECKING:
    from trl_moe_ext.hosts.trl_arguments import MoeModelConfig

__all__ = ["check_ranges", "check_use"]

# What has no meaning where the weights themselves are trained -> what to do instead.
_NOT_WITH_ESFT = {
    **dict.fromkeys(("moe_expert_r", "moe_expert_alpha", "moe_expert_rank"), "there is no rank"),
    **dict.fromkeys(("moe_kernel", "moe_save_activations"), "it has one implementation"),
    "moe_router_bias": "balance the experts by --router_aux_loss_coef",
    "router_mode": "to train the routers name them in --lora_modules_to_save",
    **dict.fromkeys(("use_rslora", "use_dora", "lora_target_parameters"), "it is for low-rank adapters"),
}
# TRL always has a value for these, so one that is given can be told from none by its difference alone.
_IGNORED_BY_ESFT = ("lora_r", "lora_alpha", "lora_dropout")
_DEFAULTS = {option.name: option.default for option in fields(ModelConfig)}


def check_use(args: MoeModelConfig, ours: Iterable[str]) -> None:
    """Refuse options that would have no effect with the adapter type that was asked for.

    Args:
        ours: names of the options of this package's adapters.

    Raises:
        ConfigError: there is such an option.
    """
    if not args.is_ours:
        given = [f"--{name}" for name in ours if _is_given(args, name)]
        if given:
            raise ConfigError(without_our_adapter(given, args.peft_type))
    elif args.peft_type == "moe_esft":
        _check_esft(args)
    elif args.use_dora:
        raise ConfigError(
            "--use_dora has no meaning on routed experts; leave it out, or use --peft_type lora without --moe_*"
        )


def _check_esft(args: MoeModelConfig) -> None:
    for name, remedy in _NOT_WITH_ESFT.items():
        if _is_given(args, name):
            raise ConfigError(
                f"--{name} has no effect with --peft_type moe_esft, which trains the weights themselves "
                f"({remedy}); leave it out, or use --peft_type moe_lora"
            )
    ignored = [f"--{name}" for name in _IGNORED_BY_ESFT if getattr(args, name) != _DEFAULTS[name]]
    if ignored:
        warnings.warn(
            f"{', '.join(ignored)}: no effect with --peft_type moe_esft, which trains the weights themselves",
            stacklevel=2,
        )


def _is_given(args: MoeModelConfig, name: str) -> bool:
    # A flag that is off asks for nothing; a zero does.
    value = getattr(args, name)
    return value is not None and value is not False


def check_ranges(args: MoeModelConfig) -> None:
    """Refuse values that no option of ours can have.

    Raises:
        ConfigError: there is such a value.
    """
    if args.peft_type is None:
        return  # stock LoRA, whose checks are PEFT's
    for name in ("lora_r", "moe_expert_r"):
        rank = getattr(args, name)
        if rank is not None and not _is_int(rank, minimum=1):
            raise ConfigError(f"--{name} is {rank!r}, which is not a rank; use a whole number of at least 1")
    if args.moe_expert_selection is not None and not isinstance(args.moe_expert_selection, str):
        raise ConfigError(
            f"--moe_expert_selection is {args.moe_expert_selection!r}; use 'all', or 'profile:FILE' with a "
            "file of `trl-moe profile`"
        )
    alpha = args.moe_expert_alpha
    if alpha is not None and not (isinstance(alpha, int | float) and alpha > 0):
        raise ConfigError(f"--moe_expert_alpha is {alpha!r}, but has to be a number above 0")
    layers = args.moe_layers_to_transform
    if layers is not None and not (layers and all(_is_int(layer, minimum=0) for layer in layers)):
        raise ConfigError(f"--moe_layers_to_transform is {layers!r}; use layer indices from 0, or leave it out")
    for name in ("moe_target", "moe_exclude_modules"):
        words = getattr(args, name)
        if words is not None and not (words and all(isinstance(word, str) for word in words)):
            raise ConfigError(f"--{name} is {words!r}; use one or more names, or leave it out")


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
