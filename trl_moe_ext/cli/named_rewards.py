"""Reward functions by name: those of `trl.rewards`, or whatever a dotted path leads to."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from trl_moe_ext.errors import ConfigError, near_matches

__all__ = ["reward_functions"]

# Names that `trl grpo` takes too.
PLAIN = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
# A function that makes one, with the numbers that `trl grpo` gives it.
OVERLONG, OVERLONG_LENGTHS = "get_soft_overlong_punishment", {"max_completion_len": 1280, "soft_punish_cache": 256}
_EXAMPLE = "a dotted path, such as my_rewards.right_answer"


def reward_functions(names: Sequence[str] | str | None) -> list[Callable[..., Any]]:
    """The functions, in the order of their names; modules are found from the current directory too.

    Raises:
        ConfigError: no name is given, or there is nothing of that name that can be called.
    """
    if not names:
        raise ConfigError(f"--reward_funcs is not given; add {' or '.join(PLAIN)}, or {_EXAMPLE}")
    # In a YAML file a single name may stand alone.
    return [_function(name) for name in ([names] if isinstance(names, str) else names)]


def _function(name: str) -> Callable[..., Any]:
    import trl.rewards

    function: Any
    if name in PLAIN:
        function = getattr(trl.rewards, name)
    elif name == OVERLONG:
        function = trl.rewards.get_soft_overlong_punishment(**OVERLONG_LENGTHS)
    elif "." in name:
        function = _imported(name)
    else:
        raise ConfigError(f"--reward_funcs {name}: {near_matches(name, (*PLAIN, OVERLONG))}; or give {_EXAMPLE}")
    if not callable(function):
        raise ConfigError(f"--reward_funcs {name} is of type {type(function).__name__}; name a function")
    return function  # type: ignore[no-any-return]


def _imported(path: str) -> Any:
    module_name, _, attribute = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Whatever else a module of the user may miss is told with its traceback.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"--reward_funcs {path}: there is no module {error.name}, neither installed nor in {os.getcwd()}"
        ) from error
    except ValueError as error:  # of an empty part, as in ".rewards.f"
        raise ConfigError(f"--reward_funcs {path} is not a dotted path; write it as {_EXAMPLE}") from error
    if not hasattr(module, attribute):
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(
            f"--reward_funcs {path}: {module_name} has no {attribute}; {near_matches(attribute, public)}"
        )
    return getattr(module, attribute)
