"""What a reward function answers, and what may be made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Answer", "RewardTimeoutError", "answer_of", "checked_rewards"]


class RewardTimeoutError(Exception):
    """A call of a reward function took too long."""


@dataclass(frozen=True)
class Answer:
    """An answer as plain numbers.

    Attributes:
        rewards: NaN where there is none.
        wrong: what was wrong with the answer, if anything.
    """

    rewards: list[float]
    wrong: str | None = None


def answer_of(returned: Any) -> Answer:
    """Plain numbers from a list, array, tensor or generator of them; None, NaN and infinities are no rewards.

    This runs code of the user: to be called where that may raise, and may take long.

    Raises:
        Exception: whatever a generator raises.
    """
    try:
        items = iter(returned)
    except TypeError:
        return Answer([], f"returned {returned!r:.80}, not a list of numbers")
    rewards, wrong = [], None
    for value in items:
        try:
            number = float(value)
        except Exception:  # of whatever kind the value is: it is no number
            number = math.nan
        if not math.isfinite(number):
            number, wrong = math.nan, f"returned {_shown(value)} for a completion"
        rewards.append(number)
    return Answer(rewards, wrong)


def checked_rewards(answer: Answer, expected: int) -> tuple[NDArray[np.float64], str | None]:
    """``(expected,)`` rewards, NaN where there is none, and what was wrong with the answer, if anything.

    Args:
        expected: how many there should be. Of another number it is not known whose they are: then there is none.
    """
    if len(answer.rewards) == expected:
        return np.asarray(answer.rewards, dtype=np.float64), answer.wrong
    told = f"returned {len(answer.rewards)} rewards for {expected} completions"
    return np.full(expected, np.nan), (answer.wrong or told) if not answer.rewards else told


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # a number of more digits than Python prints, for one
        return f"a value of type {type(value).__name__}"
