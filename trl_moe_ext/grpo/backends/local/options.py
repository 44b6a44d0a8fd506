"""Which options the local generator can serve, and what it is told of them."""

from __future__ import annotations

import os
import pickle
from typing import Any

from transformers import ContinuousBatchingConfig

from trl_moe_ext.errors import ConfigError, near_matches
from trl_moe_ext.grpo.backends.local.launch import generator_device, generator_threads
from trl_moe_ext.grpo.backends.local.wire import Setup
from trl_moe_ext.grpo.backends.protocol import BackendContext

__all__ = ["check_options", "setup_of"]

# Tokens that the cache has for each prompt where nobody says how long they are; longer ones take the place of others.
PROMPT_TOKENS = 512


def check_options(context: BackendContext) -> None:
    """Check that the generator can do what is asked of it.

    Raises:
        ConfigError: it can't, and the option is named.
    """
    sampling = context.sampling
    if context.peft_config.is_prompt_learning:
        raise ConfigError(
            f"rollout_backend='local' serves adapters in the layers of the model, and "
            f"{type(context.peft_config).__name__} works on the prompt; use LoRA, moe_lora or moe_esft"
        )
    if sampling.repetition_penalty != 1.0:
        raise ConfigError(
            f"repetition_penalty={sampling.repetition_penalty} is not supported by transformers' continuous batching; "
            "use 1.0, or rollout_backend='vllm'"
        )
    if not sampling.temperature > 0:
        raise ConfigError(f"temperature={sampling.temperature} should be more than 0: completions are sampled")
    for name, value in _cache_of(context).items():
        _check_cache(name, value)
        _check_travels(f"transformers_continuous_batching_config[{name!r}]", value)
    for name, value in context.model_init_kwargs.items():
        _check_travels(f"model_init_kwargs[{name!r}]", value)
    _check_travels("peft_config", context.peft_config)


def setup_of(context: BackendContext, seed: int, *, max_requests: int, longest_prompt: int | None) -> Setup:
    """What the generator is told at its start.

    Args:
        seed: of what is drawn until the next start.
        max_requests: completions that are asked for at the same time.
        longest_prompt: in tokens; None if nobody knows.
    """
    args = context.args
    return Setup(
        model_path=context.model_path,
        model_init_kwargs=context.model_init_kwargs,
        peft_config=pickle.dumps(context.peft_config),
        sampling=context.sampling,
        prompt_tokens=PROMPT_TOKENS if longest_prompt is None else longest_prompt,
        max_requests=max_requests,
        cache=_cache_of(context),
        seed=seed,
        device=generator_device(args),
        num_threads=generator_threads(args),
        record_routes=context.record_routes,
        pad_token_id=context.pad_token_id,
        parent_pid=os.getpid(),
    )


def _cache_of(context: BackendContext) -> dict[str, Any]:
    options = context.args.transformers_continuous_batching_config or {}
    assert not isinstance(options, str), "transformers parses options that are given as JSON"
    return {name: value for name, value in options.items() if value is not None}


def _check_travels(name: str, value: Any) -> None:
    """Check that `value` can be sent to another process."""
    try:
        pickle.dumps(value)
    except Exception as error:  # pickle passes on whatever an object of the user's raises
        raise ConfigError(
            f"{name}={value!r} can't be sent to the generator's process: {error}. Give values that pickle can take, "
            "such as text and numbers, or use rollout_backend='vllm'"
        ) from error


def _check_cache(name: str, value: Any) -> None:
    where = f"transformers_continuous_batching_config: {name}={value!r}"
    known = ContinuousBatchingConfig.__dataclass_fields__
    if name not in known:
        raise ConfigError(f"{where} is unknown; {near_matches(name, known)}")
    refused = {
        "allow_block_sharing": (bool(value), "keys and values of an older adapter would be used"),
        "use_async_batching": (bool(value), "a token drawn while an adapter is exchanged would be of no version"),
        "return_logprobs": (not value, "the loss needs the log-probabilities"),
        "use_cuda_graph": (
            any(value) if isinstance(value, list | tuple) else bool(value),
            "a graph replays without the hook of the model that gives signs of life and records routes",
        ),
    }
    is_refused, reason = refused.get(name, (False, ""))
    if is_refused:
        raise ConfigError(f"{where} can't be used here: {reason}; leave it out")
