"""From a complete group to its rewards: what fails on the way costs its completions the reward, never the run."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rewards.answers import Answer, RewardTimeoutError, checked_rewards
from trl_moe_ext.grpo.rewards.calls import one_of, reward_name
from trl_moe_ext.grpo.rewards.pool import RewardPool
from trl_moe_ext.grpo.rollout.groups import Group

__all__ = ["Scored", "Scorer"]

logger = logging.getLogger(__name__)

RAISED, TIMEOUT, INVALID = "raised", "timeout", "invalid"


@dataclass(eq=False)
class Scored:
    """A group and what its reward functions said.

    Attributes:
        completions: texts or messages, in the form of the prompt.
        rewards: ``(F, n)`` of F functions for n completions, NaN where there is none.
        seconds: from the first call to the last answer.
    """

    group: Group
    completions: list[Any]
    rewards: NDArray[np.float64]
    seconds: float = 0.0
    calls_left: int = 0


@dataclass(frozen=True)
class _Call:
    """A call of one function for some completions of a group."""

    scored: Scored
    function: int
    arguments: dict[str, list[Any]]
    completions: slice


class Scorer:
    """Calls every reward function once for each group. Its methods are for one thread.

    Args:
        wake: called from any thread when `poll` may have something new.

    Attributes:
        names: of the functions, as metrics name them.
        lost: rewards that there are not, by their cause.
        first_loss: the first of them in words, and what was raised, if anything was.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        *,
        pool_kind: str,
        concurrency: int,
        timeout_s: float,
        wake: Callable[[], None],
    ) -> None:
        self.names = [reward_name(function) for function in functions]
        self.lost: Counter[str] = Counter()
        self.first_loss: tuple[str, BaseException | None] | None = None
        self._timeout_s, self._wake = timeout_s, wake
        self._answered: deque[tuple[_Call, Future[Answer]]] = deque()
        self._warned: set[tuple[str, int]] = set()
        self._under_way = 0
        self._pool = RewardPool(functions, kind=pool_kind, concurrency=concurrency, timeout_s=timeout_s, on_done=wake)

    @property
    def under_way(self) -> int:
        """Groups whose rewards are not all there."""
        return self._under_way

    def begin(self, group: Group, completions: Sequence[Any]) -> None:
        """Ask for the rewards of a complete group; returns at once."""
        rewards = np.full((len(self.names), len(completions)), np.nan)
        scored = Scored(group, list(completions), rewards, seconds=time.monotonic())
        arguments = group.reward_arguments(completions)
        self._under_way += 1
        for function in range(len(self.names)):
            self._call(_Call(scored, function, arguments, slice(0, len(completions))))

    def poll(self) -> list[Scored]:
        """Groups that have been scored since the last call.

        Raises:
            ConfigError: the functions can't be called at all.
        """
        self._pool.expire()
        done = []
        while self._answered:
            call, future = self._answered.popleft()
            if future.cancelled():
                continue
            self._take(call, future)
            call.scored.calls_left -= 1
            if not call.scored.calls_left:
                call.scored.seconds = time.monotonic() - call.scored.seconds
                self._under_way -= 1
                done.append(call.scored)
        return done

    def stop(self) -> None:
        """End all calls."""
        self._pool.stop()

    def _call(self, call: _Call) -> None:
        call.scored.calls_left += 1
        future = self._pool.submit(call.function, call.arguments)
        future.add_done_callback(partial(self._answer, call))

    def _answer(self, call: _Call, future: Future[Answer]) -> None:
        self._answered.append((call, future))
        self._wake()

    def _take(self, call: _Call, future: Future[Answer]) -> None:
        """Keep the rewards; where the function raised for several completions, ask for each alone."""
        count = call.completions.stop - call.completions.start
        error = future.exception()
        if error is None:
            values, wrong = checked_rewards(future.result(), count)
            call.scored.rewards[call.function, call.completions] = values
            if wrong:
                self._count(INVALID, call.function, int(np.isnan(values).sum()), wrong)
        elif isinstance(error, ConfigError):
            raise error
        elif isinstance(error, RewardTimeoutError):
            self._count(TIMEOUT, call.function, count, f"took longer than reward_timeout_s={self._timeout_s:g} s")
        elif count == 1:
            self._count(RAISED, call.function, 1, f"raised {type(error).__name__}: {error}", error)
        else:
            for index in range(count):
                self._call(_Call(call.scored, call.function, one_of(call.arguments, index), slice(index, index + 1)))

    def _count(self, cause: str, function: int, count: int, what: str, error: BaseException | None = None) -> None:
        self.lost[cause] += count
        if self.first_loss is None:
            self.first_loss = f"reward function {self.names[function]} {what}", error
        if (cause, function) in self._warned:
            return
        self._warned.add((cause, function))
        logger.warning(
            "reward function %s %s; such completions have no reward of it. Further ones are only counted, in "
            "reward/%s_total",
            self.names[function],
            what,
            cause,
            exc_info=error,
        )
