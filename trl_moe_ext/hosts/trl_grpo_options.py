"""`--use_transformers_continuous_batching` of `trl grpo` and `trl rloo` with a cache of the size that a batch needs.

TRL builds a new cache for each batch of completions, so nothing in it outlives the policy that wrote it: blocks may be
shared between the completions of a prompt, and the size can follow the batch, whose prompts are known by then.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

from trl_moe_ext.errors import HostVersionError
from trl_moe_ext.grpo.backends.cache_options import cache_bytes_per_token, cache_options
from trl_moe_ext.hosts.seams import find_seam

__all__ = ["TRAINERS", "bound_cache", "with_bounded_cache"]

# Script -> the trainer that it takes from `trl`.
TRAINERS = {"grpo": "GRPOTrainer", "rloo": "RLOOTrainer"}
# Share of the free memory that the cache may take. TRL has transformers refuse a cache of more than half of it.
MEMORY_SHARE = 0.4
# Without flash attention every token is compared with all completions of its forward, so that the work grows with the
# square of their number; 64 was the fastest of 16, 32, 64 and 128 for 128 short completions on a CPU.
MOST_AT_ONCE_CPU = 64


def bound_cache(script: str | None) -> None:
    """The script builds a trainer with a cache of the right size; called after a parse that asked for our adapter.

    Args:
        script: name of the TRL script that this process runs; nothing happens for those that do not generate.
    """
    if script not in TRAINERS:
        return
    name = TRAINERS[script]
    try:
        stock = find_seam(f"trl:{name}")
        find_seam(f"trl:{name}._generate_single_turn", parameters=("prompt_ids",))
    except HostVersionError as error:
        warnings.warn(f"{error} The run goes on with transformers' own cache.", RuntimeWarning, stacklevel=2)
        return
    if not hasattr(stock, "trl_moe_ext"):
        # Into the dictionary: trl is a lazy module, whose own attribute is looked up only where there is none.
        sys.modules["trl"].__dict__[name] = with_bounded_cache(stock)


def with_bounded_cache(stock: type[Any]) -> type[Any]:
    """A trainer of TRL that gives continuous batching the cache that each batch needs; the user's options win."""

    class BoundedCacheTrainer(stock):  # type: ignore[misc]
        trl_moe_ext = True

        def _generate_single_turn(self, prompt_ids: list[list[int]], *others: Any, **kwargs: Any) -> Any:
            if self.use_transformers_continuous_batching and prompt_ids:
                for name, value in _options(self, prompt_ids).items():
                    setattr(self.continuous_batching_config, name, value)
            return super()._generate_single_turn(prompt_ids, *others, **kwargs)

    BoundedCacheTrainer.__name__, BoundedCacheTrainer.__qualname__ = stock.__name__, stock.__qualname__
    return BoundedCacheTrainer


def _options(trainer: Any, prompt_ids: list[list[int]]) -> dict[str, Any]:
    device = trainer.accelerator.device
    args = trainer.args
    given = args.transformers_continuous_batching_config or {}
    is_gpu = device.type != "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else trainer.model.dtype
    options = cache_options(
        len(prompt_ids) if is_gpu else min(len(prompt_ids), MOST_AT_ONCE_CPU),
        max(map(len, prompt_ids)) + args.max_completion_length,
        bytes_per_token=cache_bytes_per_token(trainer.model.config, dtype),
        memory=int(MEMORY_SHARE * _free_memory(device)),
        is_gpu=is_gpu,
        given=given,
    )
    if given.get("max_memory_percent") is not None:
        options.pop("num_blocks", None)  # a cache of that size was asked for
    return options


def _free_memory(device: torch.device) -> int:
    """Bytes that nobody uses on the device of the model."""
    if device.type == "cpu":
        import psutil  # type: ignore[import-untyped]  # a dependency of accelerate

        return int(psutil.virtual_memory().available)
    free, _ = torch.accelerator.get_memory_info(device)
    return int(free)
