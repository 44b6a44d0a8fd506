"""Prompts, and a reward function that takes its time: the same for both sides."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Scorer", "prompts"]

_PROMPTS = 256  # more than a run takes: none comes twice
_LARGEST = 97  # the reward is one of so many values: groups of one value, which are left out, do not happen


def prompts() -> Dataset:
    """Sums in words of the same length."""
    from datasets import Dataset

    return Dataset.from_dict(
        {"prompt": [f"How much is {10 + n % 80} plus {11 + n // 4 % 80}?" for n in range(_PROMPTS)]}
    )


class Scorer:
    """Scores a group of completions a call, as a judge behind a network does: it waits, and hardly computes.

    What it counts tells how much was generated: `completions` and their `tokens`, and the seconds in which somebody
    waited for `of_groups`.

    Args:
        latency: seconds that a call takes.
    """

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.completions = self.tokens = 0
        self.waited = 0.0
        self._lock = threading.Lock()

    def generated(self) -> dict[str, float]:
        """How much has been scored so far."""
        with self._lock:
            return {"completions": float(self.completions), "tokens": float(self.tokens)}

    def of_group(self, completion_ids: list[list[int]]) -> list[float]:
        """A reward for each completion, which its tokens decide on."""
        if self.latency:
            time.sleep(self.latency)
        with self._lock:
            self.completions += len(completion_ids)
            self.tokens += sum(map(len, completion_ids))
        return [sum(ids) % _LARGEST / (_LARGEST - 1) for ids in completion_ids]

    def of_groups(self, completion_ids: list[list[int]], size: int, concurrency: int) -> list[float]:
        """`of_group` of each `size` completions in a row, so many calls at the same time."""
        began = time.perf_counter()
        groups = [completion_ids[start : start + size] for start in range(0, len(completion_ids), size)]
        with ThreadPoolExecutor(concurrency) as pool:
            rewards = [reward for group in pool.map(self.of_group, groups) for reward in group]
        self.waited += time.perf_counter() - began
        return rewards

    def reward_function(self, size: int | None, concurrency: int) -> Any:
        """As trainers call it: with one group, or with whole batches of groups of `size`."""

        def judge(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            if size is None:
                return self.of_group(completion_ids)
            return self.of_groups(completion_ids, size, concurrency)

        return judge
