"""What is asked for, as a whole and of one process."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from trl_moe_ext.errors import ConfigError

__all__ = ["Plan", "Request", "Side", "Workload"]

# ``generator``: that of the asynchronous side, with a trainer that takes no time.
Side = Literal["sync", "async", "generator"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, the same in every process.

    Attributes:
        model: directory of the model.
        prompts: of a step, each a group.
        num_generations: completions of a group.
        completion_length: tokens of every completion: none ends before.
        rank: of all low-rank factors.
        steps: optimizer steps that are timed.
        warm_up: optimizer steps before them.
        max_staleness: of the asynchronous side.
        concurrency: calls of the reward function at the same time, on both sides.
    """

    model: str
    prompts: int
    num_generations: int
    completion_length: int
    rank: int
    steps: int
    warm_up: int
    max_staleness: int
    concurrency: int

    @property
    def completions(self) -> int:
        """Of an optimizer step."""
        return self.prompts * self.num_generations


@dataclass(frozen=True, kw_only=True)
class Request(Workload):
    """What the user asks for.

    Attributes:
        latencies: seconds that every call of the reward function takes, one comparison each.
        rounds: how often each side gets a new process.
    """

    latencies: tuple[float, ...]
    rounds: int

    def __post_init__(self) -> None:
        if self.warm_up < 1:
            raise ConfigError(
                "a step begins where the one before ends, and the first ones start up: use warm_up 1 or more"
            )

    def plan(self, side: Side, cores: Sequence[int], latency: float) -> Plan:
        """What one process does."""
        workload = {field.name: getattr(self, field.name) for field in fields(Workload)}
        return Plan(**workload, side=side, cores=tuple(cores), latency=latency)

    @property
    def command(self) -> str:
        """The command line that asks for the same, every option in it."""
        options: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        model, latencies = options.pop("model"), options.pop("latencies")
        given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        listed = ",".join(f"{latency:g}" for latency in latencies)
        return shlex.join(["trl-moe", "bench", "grpo", model, "--latency", listed, *given])


@dataclass(frozen=True, kw_only=True)
class Plan(Workload):
    """What one process does.

    Attributes:
        side: what is measured.
        cores: that the process and its children may use; as many threads compute.
        latency: seconds that every call of the reward function takes.
    """

    side: Side
    cores: tuple[int, ...]
    latency: float
