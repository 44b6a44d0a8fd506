"""What an async GRPO run is refused for, before its model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from torch import nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.protocol import RolloutBackend
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.rewards.sendable import SentFunctions, check_main_is_guarded
from trl_moe_ext.plugins import host

__all__ = ["check_arguments", "groups_per_step", "reward_functions"]


def check_arguments(
    model: Any, args: Any, train_dataset: Any, peft_config: Any, rollout_backend: Any, unserved: dict[str, Any]
) -> None:
    """Check the arguments of the trainer, beside its reward functions, and that this process is to train at all.

    Args:
        unserved: name -> value of arguments of TRL's trainer that this one has no use for.

    Raises:
        ConfigError: one of them can't be served; or this process was started by another that runs the same script,
            and only imports it.
        PluginError: there is no such rollout backend.
    """
    check_main_is_guarded()
    given = [name for name, value in unserved.items() if value is not None]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: conversations with tools and environments need TRL's own AsyncGRPOTrainer and its "
            "vLLM server; this trainer asks for one completion a prompt. Leave them out"
        )
    if not isinstance(model, str):
        raise ConfigError(
            f"model should be a path or the name of a repository, which the generator can load too; found "
            f"{type(model).__name__}"
        )
    if not isinstance(args, AsyncMoeGRPOConfig):
        raise ConfigError(f"args should be an AsyncMoeGRPOConfig; found {type(args).__name__}")
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"peft_config={peft_config!r}: only an adapter travels to the generator, so there has to be one; give a "
            "MoeLoraConfig or another PeftConfig"
        )
    _check_dataset(train_dataset)
    _check_backend(args, rollout_backend)
    groups_per_step(args)


def reward_functions(reward_funcs: Any, args: AsyncMoeGRPOConfig) -> list[Callable[..., Any]]:
    """The reward functions as a list.

    Raises:
        ConfigError: there is none, one is a model, or the options can't be served with them.
    """
    functions = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    functions = [function for function in functions if function is not None]
    if not functions:
        raise ConfigError("reward_funcs is empty: completions that nothing scores teach nothing; give a function")
    for function in functions:
        if isinstance(function, str) or not callable(function) or isinstance(function, nn.Module):
            raise ConfigError(
                f"reward_funcs should be functions; found {function!r}. To score with a model, load it yourself and "
                "give a function that calls it"
            )
    if args.reward_weights is not None and len(args.reward_weights) != len(functions):
        raise ConfigError(
            f"reward_weights has {len(args.reward_weights)} weights for {len(functions)} reward functions; give one "
            "each"
        )
    if args.reward_pool == "process":
        SentFunctions.of(functions)
    return functions


def groups_per_step(args: AsyncMoeGRPOConfig) -> int:
    """Prompts of an optimizer step.

    Raises:
        ConfigError: a step would end in the midst of the completions of a prompt.
    """
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if samples % args.num_generations:
        raise ConfigError(
            f"a step has {samples} samples (per_device_train_batch_size={args.per_device_train_batch_size} times "
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} times {args.world_size} processes), "
            f"which is no multiple of num_generations={args.num_generations}; change one of them"
        )
    return int(samples // args.num_generations)


def _check_dataset(train_dataset: Any) -> None:
    if not isinstance(train_dataset, Dataset):
        raise ConfigError(
            f"train_dataset should be a datasets.Dataset; found {type(train_dataset).__name__}. Its size has to be "
            "known, for prompts that are lost with the generator are asked for again: load it without streaming"
        )
    if "prompt" not in train_dataset.column_names or not len(train_dataset):
        raise ConfigError(
            f"train_dataset should have rows and a column 'prompt'; found {len(train_dataset)} rows of "
            f"{train_dataset.column_names}"
        )


def _check_backend(args: AsyncMoeGRPOConfig, rollout_backend: Any) -> None:
    if rollout_backend is not None:
        if not isinstance(rollout_backend, RolloutBackend):
            raise ConfigError(
                f"rollout_backend should be a RolloutBackend; found {type(rollout_backend).__name__}. A name goes "
                "into the options: AsyncMoeGRPOConfig(rollout_backend=...)"
            )
        return
    registered = host().lookup("register_rollout_backends", args.rollout_backend)
    if args.routing_replay and not registered.records_routes:
        raise ConfigError(
            f"routing_replay needs a backend that records routes, and rollout_backend={args.rollout_backend!r} does "
            "not; use 'local', or switch routing_replay off"
        )
