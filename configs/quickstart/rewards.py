"""The reward of `grpo.yaml`, which names it by its dotted path: `configs.quickstart.rewards.right_answer`."""

import re
from typing import Any

NUMBER = re.compile(r"\d+")


def right_answer(completions: list[Any], answer: list[str], **others: Any) -> list[float]:
    """Return 1 for each completion whose last number is the answer, else 0.

    Args:
        completions: texts, or chats of one reply.
        answer: of the same length, a column of the dataset.
        others: what else TRL hands to a reward function.
    """
    return [float(last_number(completion) == result) for completion, result in zip(completions, answer, strict=True)]


def last_number(completion: str | list[dict[str, str]]) -> str | None:
    """Return the last number in a completion as it is written, None if there is none."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None
