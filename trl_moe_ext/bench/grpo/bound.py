"""How much faster than one after the other things can be that go on at the same time."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Costs", "bound", "bound_of_overlap"]


@dataclass(frozen=True)
class Costs:
    """Seconds of one optimizer step.

    Attributes:
        generation: of its completions, with all cores.
        training: with all cores.
        reward_wait: that the synchronous side waits for rewards.
        generation_on_part: with the cores that the generator has on the asynchronous side, by the synchronous one.
        generator_on_part: the same by the generator of the asynchronous side, whose trainer takes no time.
        training_on_part: with the other cores.
        reward_calls: the latencies of all calls together.
        concurrency: calls at the same time.
    """

    generation: float
    training: float
    reward_wait: float
    generation_on_part: float
    generator_on_part: float
    training_on_part: float
    reward_calls: float
    concurrency: int

    @property
    def one_after_the_other(self) -> float:
        """Seconds of a step whose parts wait for each other."""
        return self.generation + self.reward_wait + self.training

    def at_the_same_time(self, generation: float) -> float:
        """Seconds of a step of a pipeline: those of its slowest part."""
        return max(generation, self.reward_calls / self.concurrency, self.training_on_part)


def bound(costs: Costs) -> float:
    """Sync over async, in seconds of a step, if nothing is waited for but the slowest part.

    The generator of the asynchronous side is faster than generation on the synchronous side with as many cores: it
    lives on from step to step, and has the completions of several steps under way. This bound has all of that.
    """
    return costs.one_after_the_other / costs.at_the_same_time(costs.generator_on_part)


def bound_of_overlap(costs: Costs) -> float:
    """What there would be to gain with the generation of the synchronous side: by the order of the work alone."""
    return costs.one_after_the_other / costs.at_the_same_time(costs.generation_on_part)
