"""Which options of an async GRPO run are refused by themselves, whatever model and data they are for."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from trl_moe_ext.errors import ConfigError, near_matches

if TYPE_CHECKING:
    from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig

__all__ = ["check_config"]

_MORE_THAN_0 = ("reward_timeout_s", "reward_concurrency", "heartbeat_stale_after_s", "weight_sync_steps")
_AT_LEAST_0 = ("max_staleness", "max_rollout_restarts", "queue_maxsize")
_CHOSEN = ("reward_pool", "importance_correction", "importance_level")
_OF_CORRECTION = ("importance_level", "importance_cap", "importance_floor")
_OF_CLIPPING = ("epsilon", "epsilon_high")


def check_config(args: AsyncMoeGRPOConfig) -> None:
    """Check what can be known before there is anything else.

    Raises:
        ConfigError: an option is unknown, out of its range or without effect.
    """
    _check_choices(args)
    _check_ranges(args)
    if args.token_budget is None:
        raise ConfigError(
            "token_budget=None leaves it to a vLLM server, which there may not be; give a number of tokens, or -1 "
            "for no limit"
        )
    if args.auto_find_batch_size:
        raise ConfigError(
            "auto_find_batch_size begins a run again and again, which a generator that is under way does not allow; "
            "set per_device_train_batch_size"
        )
    _check_loss(args)


def _check_choices(args: AsyncMoeGRPOConfig) -> None:
    """The command line checks them too; in Python nobody else does."""
    for option in fields(args):
        known = option.metadata.get("choices")
        value = getattr(args, option.name)
        if known and option.name in _CHOSEN and value not in known:
            raise ConfigError(f"{option.name}={value!r} is unknown; {near_matches(str(value), known)}")


def _check_ranges(args: AsyncMoeGRPOConfig) -> None:
    for name in _MORE_THAN_0:
        if not getattr(args, name) > 0:
            raise ConfigError(f"{name}={getattr(args, name)} should be more than 0")
    for name in _AT_LEAST_0:
        if getattr(args, name) < 0:
            raise ConfigError(f"{name}={getattr(args, name)} should be 0 or more")
    if args.max_inflight_tasks == 0:
        raise ConfigError("max_inflight_tasks=0 generates nothing; use 1 or more, or -1 to have it chosen")
    if args.num_generations < 2:
        raise ConfigError(
            f"num_generations={args.num_generations}: an advantage compares the completions of one prompt; use 2 or "
            "more"
        )


def _check_loss(args: AsyncMoeGRPOConfig) -> None:
    """Refuse options of the one loss with the other, where they would do nothing."""
    correction = args.correction  # raises for options that do not go together
    unused = _OF_CLIPPING if correction else _OF_CORRECTION
    defaults = {option.name: option.default for option in fields(args)}
    given = [f"{name}={getattr(args, name)}" for name in unused if getattr(args, name) != defaults[name]]
    if given and correction:
        raise ConfigError(
            f"{', '.join(given)}: nothing is clipped with importance_correction={args.importance_correction!r}, which "
            "limits the ratio of trainer and generator by importance_cap. Leave it out, or set "
            "importance_correction='none' for TRL's clipped loss"
        )
    if given:
        raise ConfigError(
            f"{', '.join(given)} has no effect with importance_correction='none'; leave it out, or choose 'tis' or "
            "'mis'"
        )
