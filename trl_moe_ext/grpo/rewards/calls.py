"""One call of a reward function, sync or async, and the names and arguments that it goes by."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from trl_moe_ext.grpo.rewards.answers import Answer, answer_of
from trl_moe_ext.grpo.rewards.event_loop import EventLoop

__all__ = ["call_reward", "one_of", "reward_name"]


def reward_name(function: Callable[..., Any]) -> str:
    """As TRL names its metric: by the function, or by the class of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def call_reward(
    function: Callable[..., Any], arguments: Mapping[str, Any], loop: EventLoop, timeout_s: float
) -> Answer:
    """What the function answers; that of an async one is awaited in `loop`, for at most `timeout_s`.

    Raises:
        RewardTimeoutError: an async function took longer; it has been cancelled. A sync one can't be.
        Exception: whatever the function raises.
    """
    returned = function(**arguments)
    return answer_of(loop.run(returned, timeout_s) if inspect.isawaitable(returned) else returned)


def one_of(arguments: Mapping[str, list[Any]], index: int) -> dict[str, list[Any]]:
    """The arguments of a call for one of the completions."""
    return {name: [values[index]] for name, values in arguments.items()}
