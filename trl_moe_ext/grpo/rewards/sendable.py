"""What reward functions in processes of their own ask of a script: functions that can be sent, and a guarded main."""

from __future__ import annotations

import functools
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rewards.calls import reward_name

__all__ = ["UNGUARDED", "SentFunctions", "check_main_is_guarded"]

UNGUARDED = (
    "the script would train again in each process that it starts, because such a process imports it: guard the script "
    "by `if __name__ == \"__main__\":`, or use reward_pool='thread'"
)


def check_main_is_guarded() -> None:
    """Raise ConfigError in a process that runs the user's script only to import it, as those of rewards do first."""
    # What multiprocessing itself asks before it starts a process.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(UNGUARDED)


@dataclass(frozen=True)
class SentFunctions:
    """Reward functions on their way to a process.

    Attributes:
        names: for messages.
        pickled: the list of them.
    """

    names: tuple[str, ...]
    pickled: bytes

    @classmethod
    def of(cls, functions: Sequence[Callable[..., Any]]) -> SentFunctions:
        """Ready to be sent.

        Raises:
            ConfigError: one of them is such that no other process can have it.
        """
        for function in functions:
            problem = _problem(function)
            if problem is not None:
                raise ConfigError(
                    f"reward function {reward_name(function)} can't be sent to a process: {problem}. Define it at the "
                    "top of a module, or use reward_pool='thread'"
                )
        return cls(tuple(map(reward_name, functions)), pickle.dumps(list(functions)))


def _problem(function: Callable[..., Any]) -> str | None:
    try:
        pickle.dumps(function)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        return str(error)
    while isinstance(function, functools.partial):
        function = function.func
    if getattr(function, "__module__", None) == "__main__" and not _main_can_be_imported():
        return "it was defined in a notebook or at a prompt, which no process can import"
    return None


def _main_can_be_imported() -> bool:
    """As multiprocessing finds the script for a new process: by the name of a module, or by its file."""
    main = sys.modules["__main__"]
    return getattr(main, "__spec__", None) is not None or getattr(main, "__file__", None) is not None
