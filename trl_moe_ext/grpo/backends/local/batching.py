"""transformers' continuous batching, set up to draw exactly as a run asks and to let its adapter be exchanged."""

from __future__ import annotations

from typing import Any

import psutil  # type: ignore[import-untyped]  # a dependency of accelerate
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.cache_options import cache_bytes_per_token, cache_options
from trl_moe_ext.grpo.backends.local.wire import Setup

__all__ = ["make_manager"]

# Share of the free memory that the cache may take: the trainer may need the rest.
MEMORY_SHARE = 0.25


def make_manager(setup: Setup, model: Any) -> ContinuousBatchingManager:
    """What generates with the model, which is not started yet.

    Raises:
        ConfigError: it can't draw as `setup` says, or there is no room for its cache.
    """
    sampling = setup.sampling
    options = {
        # A shared block could hold keys and values of an older adapter.
        "allow_block_sharing": False,
        # A token that is being drawn while an adapter is exchanged would be of no version.
        "use_async_batching": False,
        "use_cuda_graph": False,
        # The generator should compute as the trainer does.
        "auto_switch_to_flash": False,
        "return_logprobs": True,
        "seed": setup.seed,
    } | _cache(setup, model)
    manager = model.init_continuous_batching(
        generation_config=_generation_config(setup),
        continuous_batching_config=ContinuousBatchingConfig(**options),
    )
    wanted = [sampling.temperature != 1, sampling.top_k > 0, sampling.top_p < 1, sampling.min_p is not None]
    if len(manager.logit_processor.logits_processor) != sum(wanted):
        raise ConfigError(
            f"transformers' continuous batching can't draw as {sampling} says; leave top_p, top_k and min_p out"
        )
    return manager


def _generation_config(setup: Setup) -> GenerationConfig:
    """A config of nothing but what was asked for: what the model comes with would shape the distribution as well."""
    sampling = setup.sampling
    return GenerationConfig(
        do_sample=True,
        max_new_tokens=sampling.max_completion_length,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        eos_token_id=list(sampling.eos_token_ids) or -1,
        pad_token_id=setup.pad_token_id,
    )


def _cache(setup: Setup, model: Any) -> dict[str, Any]:
    device = torch.device(setup.device)
    if device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        free, _ = torch.accelerator.get_memory_info(device)
    found = cache_options(
        setup.max_requests,
        setup.prompt_tokens + setup.sampling.max_completion_length,
        bytes_per_token=cache_bytes_per_token(model.config, model.dtype),
        memory=int(MEMORY_SHARE * free),
        is_gpu=device.type != "cpu",
        given=setup.cache,
    )
    return found | setup.cache
