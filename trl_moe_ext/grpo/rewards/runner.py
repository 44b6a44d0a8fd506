"""What a thread of the reward pool runs its calls with: itself, or a process that it may kill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_moe_ext.grpo.rewards.answers import Answer
from trl_moe_ext.grpo.rewards.calls import call_reward
from trl_moe_ext.grpo.rewards.event_loop import EventLoop

__all__ = ["InThread", "Runner"]


class Runner(ABC):
    """Runs the calls of one thread of the pool, one after another."""

    @abstractmethod
    def run(self, function: int, arguments: Mapping[str, Any]) -> Answer:
        """What function number `function` answers; raises what the call comes to instead."""

    @abstractmethod
    def close(self) -> None:
        """From any thread: end a call that is running, if that is possible."""


class InThread(Runner):
    """In the thread itself, where nothing can end a call but the limit of async ones."""

    def __init__(self, functions: Sequence[Callable[..., Any]], loop: EventLoop, timeout_s: float) -> None:
        self._functions, self._loop, self._timeout_s = functions, loop, timeout_s

    def run(self, function: int, arguments: Mapping[str, Any]) -> Answer:
        return call_reward(self._functions[function], arguments, self._loop, self._timeout_s)

    def close(self) -> None:
        pass
