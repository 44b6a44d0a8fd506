"""The size of the cache: what is needed, within what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.cache_options import cache_bytes_per_token, cache_options

PER_TOKEN = 1000
BLOCK = 32 * (PER_TOKEN + 4 * (8 + 256))  # with the mask's column for each token of the cache


def options(
    num_requests: int = 8, tokens_per_request: int = 150, memory: int = 2**30, **others: Any
) -> dict[str, Any]:
    return cache_options(num_requests, tokens_per_request, memory=memory, bytes_per_token=PER_TOKEN, **others)


def test_all_requests_fit() -> None:
    assert options() == {
        "page_size": 32,
        "num_blocks": 8 * 5,  # 150 tokens are 4.7 pages
        "max_batch_tokens": 8 + 256,
        "max_requests_per_batch": 8,
        "safety_margin": 0.0,
    }


def test_pages_of_a_gpu_suit_flash_kernels() -> None:
    found = options(is_gpu=True)
    assert (found["page_size"], found["num_blocks"]) == (256, 8)


def test_more_than_are_fast_together_wait_their_turn() -> None:
    found = options(500)
    assert (found["max_requests_per_batch"], found["num_blocks"]) == (64, 64 * 5)
    assert options(500, is_gpu=True)["max_requests_per_batch"] == 500
    assert options(500, given={"max_requests_per_batch": 3})["num_blocks"] == 3 * 5
    assert options(2, given={"max_requests_per_batch": 64})["num_blocks"] == 2 * 5


def test_memory_is_bounded() -> None:
    found = options(memory=20 * BLOCK)
    assert found["num_blocks"] == 20
    assert "safety_margin" not in found  # the library's own: they may be in each other's way
    assert options(memory=20 * BLOCK - 1)["num_blocks"] == 19


def test_less_than_one_request_is_refused() -> None:
    assert options(memory=5 * BLOCK)["num_blocks"] == 5
    with pytest.raises(ConfigError, match=r"150 tokens.*max_completion_length"):
        options(memory=5 * BLOCK - 1)


def test_what_the_user_has_set_is_left_alone_and_counted_with() -> None:
    found = options(given={"page_size": 50, "max_batch_tokens": None})
    assert found == {
        "num_blocks": 8 * 3, "max_batch_tokens": 264, "max_requests_per_batch": 8, "safety_margin": 0.0,
    }  # fmt: skip
    assert "num_blocks" not in options(memory=1, given={"num_blocks": 7})


@pytest.mark.parametrize("name", ["num_requests", "tokens_per_request"])
def test_numbers_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0"):
        options(**{name: 0})


def test_bytes_per_token() -> None:
    config = Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16
    )
    kept, read = 2 * 3 * 2 * 16, (2 * 4 + 2) * 16
    assert cache_bytes_per_token(config, torch.float32) == 4 * (kept + read)
    assert cache_bytes_per_token(config, torch.bfloat16) == 2 * (kept + read)
