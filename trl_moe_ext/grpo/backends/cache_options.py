"""How large the cache of keys and values of transformers' continuous batching should be.

Left alone, the library takes most of the memory for it: 14 GB for a model of 2 M parameters on a CPU. Here it holds
what the completions that are worth generating at the same time need, or as much of that as the memory allows; the
others wait their turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["cache_bytes_per_token", "cache_options"]

# The part of the cache that is given out at once, in tokens. On a GPU the library's own: its flash kernels read pages
# of a multiple of 256.
_PAGE_SIZE = {False: 32, True: 256}
# Tokens of prompts that one forward takes beside one token of each completion under way. The mask of attention without
# flash kernels has a row for each of these and a column for every token of the cache.
_PREFILL_TOKENS = {False: 256, True: 1024}
# Completions in one forward. Attention without flash kernels scores every query against the keys of all requests, at
# the cost of the square of their number: with a model of 2 M parameters on one core, 128 at a time gave half the
# tokens a second of 32, and 64 about as many.
_AT_A_TIME = {False: 64, True: 1024}
# The mask is of the dtype of the model; this is its largest.
_BYTES_OF_MASK = 4


def cache_options(
    num_requests: int,
    tokens_per_request: int,
    *,
    bytes_per_token: int,
    memory: int,
    is_gpu: bool = False,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Options of `ContinuousBatchingConfig` for a cache that is as large as it needs to be.

    Args:
        num_requests: completions that are asked for at the same time.
        tokens_per_request: of prompt and completion. A longer request takes the place of others.
        bytes_per_token: see `cache_bytes_per_token`.
        memory: bytes that the cache and what grows with it may take.
        is_gpu: whether the model is on one.
        given: options that the user has set; they are not in the result, which fits to them.

    Returns:
        ``page_size``, ``num_blocks``, ``max_batch_tokens``, ``max_requests_per_batch`` and ``safety_margin``, without
        those given.

    Raises:
        ConfigError: the memory is not enough for a single request, or a number is not positive.
    """
    for name, value in (("num_requests", num_requests), ("tokens_per_request", tokens_per_request)):
        if value < 1:
            raise ConfigError(f"{name}={value} should be 1 or more")
    given = {name: value for name, value in (given or {}).items() if value is not None}
    at_a_time = given.get("max_requests_per_batch", min(num_requests, _AT_A_TIME[is_gpu]))
    options = {
        "page_size": _PAGE_SIZE[is_gpu],
        "max_batch_tokens": at_a_time + _PREFILL_TOKENS[is_gpu],
        "max_requests_per_batch": at_a_time,
    } | given
    if "num_blocks" not in given:
        page = options["page_size"]
        block = page * (bytes_per_token + _BYTES_OF_MASK * options["max_batch_tokens"])
        needed = math.ceil(tokens_per_request / page)
        affordable = memory // block
        if affordable < needed:
            raise ConfigError(
                f"the cache of one completion of {tokens_per_request} tokens takes {needed * block / 2**20:,.0f} MiB, "
                f"and {memory / 2**20:,.0f} MiB may be used. Lower max_completion_length or the number of completions "
                "at a time, leave the longest prompts out, or set num_blocks and max_batch_tokens in "
                "transformers_continuous_batching_config"
            )
        wanted = min(at_a_time, num_requests) * needed
        options["num_blocks"] = min(wanted, affordable)
        if options["num_blocks"] == wanted:
            # There is room for all to their end: none has to wait until a part of the cache is free.
            options["safety_margin"] = 0.0
    return {name: value for name, value in options.items() if name not in given}


def cache_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token in the cache: its keys and values in all layers, and their copies while one layer reads them.

    The copies are those of attention without flash kernels: key and value repeated for every head, and the value read.

    Args:
        config: of the model, or of its language model.
        dtype: of the model.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = 2 * text.num_hidden_layers * kv_heads * head_dim
    read = (2 * heads + kv_heads) * head_dim
    return int((kept + read) * dtype.itemsize)
