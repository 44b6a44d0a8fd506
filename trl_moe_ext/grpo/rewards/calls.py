"""One call of a reward function: sync or async, and what may be made of its answer."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RewardTimeoutError", "call_reward", "checked_rewards", "one_of", "reward_name"]


class RewardTimeoutError(Exception):
    """A call of a reward function took too long."""


def reward_name(function: Callable[..., Any]) -> str:
    """As TRL names its metric: by the function, or by the class of a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def call_reward(function: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float) -> Any:
    """What the function returns; that of an async one is awaited, for at most `timeout_s`.

    Raises:
        RewardTimeoutError: an async function took longer; it has been cancelled. A sync one can't be.
        Exception: whatever the function raises.
    """
    returned = function(**arguments)
    if not inspect.isawaitable(returned):
        return returned

    async def awaited() -> Any:
        try:
            async with asyncio.timeout(timeout_s) as limit:
                return await returned
        except TimeoutError as error:
            if limit.expired():
                raise RewardTimeoutError from error
            raise

    return asyncio.run(awaited())


def checked_rewards(returned: Any, expected: int) -> tuple[NDArray[np.float64], str | None]:
    """``(expected,)`` rewards, NaN where there is none, and what was wrong with the answer, if anything.

    Args:
        returned: a list, array or tensor of numbers; None, NaN and infinities are no rewards.
        expected: how many there should be. Of another number it is not known whose they are: then there is none.
    """
    rewards = np.full(expected, np.nan)
    try:
        values = list(returned)
    except TypeError:
        return rewards, f"returned {returned!r:.80}, not a list of {expected} numbers"
    if len(values) != expected:
        return rewards, f"returned {len(values)} rewards for {expected} completions"
    wrong = None
    for index, value in enumerate(values):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            rewards[index] = number
        else:
            wrong = f"returned {value!r:.80} for a completion"
    return rewards, wrong


def one_of(arguments: Mapping[str, list[Any]], index: int) -> dict[str, list[Any]]:
    """The arguments of a call for one of the completions."""
    return {name: [values[index]] for name, values in arguments.items()}
