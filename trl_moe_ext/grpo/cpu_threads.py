"""The cores of a machine without a GPU, shared by the trainer and its generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.machine import usable_cores

if TYPE_CHECKING:
    from accelerate import Accelerator

    from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig

__all__ = ["cores", "share_of_trainer", "shared_cores", "threads_of_trainer"]


def cores() -> int:
    """Cores that this process may use."""
    return usable_cores() or 1


def share_of_trainer(num_cores: int, generator_threads: int | None, processes: int = 1) -> int:
    """Threads of each process of the trainer: the cores that the generator leaves, at least one.

    Args:
        num_cores: that the processes may use.
        generator_threads: half of the cores by default.
        processes: of the trainer on this machine.

    Raises:
        ConfigError: the generator is to have no thread.
    """
    if generator_threads is None:
        generator_threads = max(1, num_cores // 2)
    if generator_threads < 1:
        raise ConfigError(f"rollout_num_threads={generator_threads} should be 1 or more, or left out")
    return max(1, (num_cores - generator_threads) // processes)


def shared_cores(args: AsyncMoeGRPOConfig, accelerator: Accelerator) -> AbstractContextManager[None]:
    """What a run trains within: its share of the cores, if the backend that `args` name generates on them too."""
    is_local = args.rollout_backend == "local" and args.rollout_device in ("auto", "cpu")
    if not is_local or torch.cuda.is_available() or accelerator.device.type != "cpu":
        return nullcontext()
    return threads_of_trainer(args.rollout_num_threads, accelerator.num_processes)


@contextmanager
def threads_of_trainer(generator_threads: int | None, processes: int) -> Iterator[None]:
    """The trainer's share while inside, and no more than it had before."""
    before = torch.get_num_threads()
    share = share_of_trainer(cores(), generator_threads, processes)
    torch.set_num_threads(min(before, share))
    try:
        yield
    finally:
        torch.set_num_threads(before)
