"""The measurements of both sides and the figures that they give."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_moe_ext.bench.grpo.bound import Costs, bound, bound_of_overlap
from trl_moe_ext.bench.grpo.clock import Measured
from trl_moe_ext.bench.grpo.plan import Request
from trl_moe_ext.bench.results import Spread, spread
from trl_moe_ext.grpo.timeline import GENERATOR, TRAINER

__all__ = ["Comparison", "Results", "step_seconds"]


@dataclass(frozen=True)
class Comparison:
    """Both sides with one latency of the rewards.

    Attributes:
        sync, asynchronous: seconds of a step.
        ratio: of their medians.
        bound, bound_of_overlap: what the ratio could be, see the functions of that name.
        sync_tokens, async_tokens: tokens of completions that are trained on, a second.
        trainer_wait, generator_idle: shares of their time, on the asynchronous side.
    """

    latency: float
    sync: Spread
    asynchronous: Spread
    ratio: float
    costs: Costs
    bound: float
    bound_of_overlap: float
    sync_tokens: float
    async_tokens: float
    trainer_wait: float
    generator_idle: float

    @property
    def share_of_bound(self) -> float:
        """1 is all that could be had."""
        return self.ratio / self.bound


@dataclass
class Results:
    """All measurements of a request.

    Attributes:
        sync, asynchronous: latency -> rounds, with all cores.
        generator: rounds of the generator alone, on its part of the cores.
        sync_on_generator_part, sync_on_trainer_part: rounds of the synchronous side on a part of the cores.
        failures: what was not measured and why, one line each.
    """

    request: Request
    sync: dict[float, list[Measured]] = field(default_factory=dict)
    asynchronous: dict[float, list[Measured]] = field(default_factory=dict)
    generator: list[Measured] = field(default_factory=list)
    sync_on_generator_part: list[Measured] = field(default_factory=list)
    sync_on_trainer_part: list[Measured] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def comparisons(self) -> list[Comparison]:
        """One for each latency that was measured on both sides; none without the parts."""
        if not (self.generator and self.sync_on_generator_part and self.sync_on_trainer_part):
            return []
        both = (latency for latency in self.request.latencies if self.sync.get(latency))
        return [self._comparison(latency) for latency in both if self.asynchronous.get(latency)]

    def _comparison(self, latency: float) -> Comparison:
        per_step = self.request.completions
        sync, asynchronous = (
            spread([step_seconds(measured, per_step) for measured in side[latency]])
            for side in (self.sync, self.asynchronous)
        )
        costs = self._costs(latency)
        tokens = per_step * self.request.completion_length
        return Comparison(
            latency=latency,
            sync=sync,
            asynchronous=asynchronous,
            ratio=sync.median / asynchronous.median,
            costs=costs,
            bound=bound(costs),
            bound_of_overlap=bound_of_overlap(costs),
            sync_tokens=tokens / sync.median,
            async_tokens=tokens / asynchronous.median,
            trainer_wait=_median(self.asynchronous[latency], lambda m: _share(m, TRAINER, "waiting")),
            generator_idle=_median(self.asynchronous[latency], lambda m: _share(m, GENERATOR, "idle")),
        )

    def _costs(self, latency: float) -> Costs:
        everywhere = [measured for rounds in self.sync.values() for measured in rounds]
        return Costs(
            generation=_median(everywhere, _generation),
            training=_median(everywhere, _training),
            reward_wait=_median(self.sync[latency], _reward_wait),
            generation_on_part=_median(self.sync_on_generator_part, _generation),
            generator_on_part=_median(self.generator, lambda m: step_seconds(m, self.request.completions)),
            training_on_part=_median(self.sync_on_trainer_part, _training),
            reward_calls=latency * self.request.prompts,
            concurrency=self.request.concurrency,
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a machine to read."""
        told = [{**asdict(found), "share_of_bound": found.share_of_bound} for found in self.comparisons()]
        return {"command": self.request.command, **asdict(self), "comparisons": told}


def step_seconds(measured: Measured, completions_per_step: int) -> float:
    """Seconds of a step that both trains on its completions and has them generated.

    A trainer that lives on what was generated while it warmed up gets no credit for it: if fewer completions than it
    trained on came out of the rewards in that time, these count.
    """
    generated = measured.read["completions"] / completions_per_step
    return measured.seconds / min(float(measured.steps), generated)


def _generation(measured: Measured) -> float:
    return measured.read["generation"] / measured.steps


def _reward_wait(measured: Measured) -> float:
    return measured.read["reward_wait"] / measured.steps


def _training(measured: Measured) -> float:
    return measured.seconds / measured.steps - _generation(measured) - _reward_wait(measured)


def _share(measured: Measured, lane: str, state: str) -> float:
    """Part of the time of `lane` that it spent in `state`."""
    total = sum(value for name, value in measured.read.items() if name.startswith(f"{lane}/"))
    return measured.read.get(f"{lane}/{state}", 0.0) / total if total else 0.0


def _median(rounds: Sequence[Measured], figure: Callable[[Measured], float]) -> float:
    return statistics.median(map(figure, rounds))
