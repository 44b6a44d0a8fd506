"""All measurements of a request, each in a process of its own, in interleaved rounds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from trl_moe_ext.bench.figures import figure
from trl_moe_ext.bench.grpo.clock import Measured
from trl_moe_ext.bench.grpo.plan import Plan, Request
from trl_moe_ext.bench.grpo.process import Keep, measure_in_process
from trl_moe_ext.bench.grpo.results import Results, step_seconds
from trl_moe_ext.bench.process import Missing
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.cpu_threads import share_of_trainer
from trl_moe_ext.reporting.rollout_files import TIMELINE_PICTURE

__all__ = ["run", "split_cores", "usable_cores"]

Measure = Callable[[Plan, Keep | None], Measured | Missing]
Say = Callable[[str], object]
Cores = Sequence[int]


def usable_cores() -> list[int]:
    """The cores of this process.

    Raises:
        ConfigError: there is one, or the system does not let processes keep to some of them.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError("trl-moe bench grpo gives processes their cores, which this system can't; run it on Linux")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("with a single core nothing can go on at the same time; trl-moe bench grpo needs two")
    return cores


def split_cores(cores: Cores) -> tuple[Cores, Cores]:
    """Those of the generator and those of the trainer, as many as they have by default."""
    trainer = share_of_trainer(len(cores), None)
    return cores[trainer:], cores[:trainer]


def run(
    request: Request, cores: Cores, say: Say, plot: Path | None = None, measure: Measure = measure_in_process
) -> Results:
    """Measure both sides with every latency, and what the bound is made of, in each round.

    Args:
        request: what to measure.
        cores: to measure on.
        say: told about each measurement, before it starts and when it is done, in parts of a line.
        plot: file for the timeline of the last asynchronous run, which has the highest latency.
        measure: how one plan is carried out.
    """
    results = Results(request)

    def keep_picture(directory: Path) -> None:
        if plot is not None and (directory / TIMELINE_PICTURE).is_file():
            shutil.copyfile(directory / TIMELINE_PICTURE, plot)

    for number in range(1, request.rounds + 1):
        for what, plan, rounds in _of_a_round(results, cores):
            say(f"round {number} of {request.rounds}, {what}: ")
            found = measure(plan, keep_picture if plan.side == "async" else None)
            if isinstance(found, Missing):
                results.failures.append(f"{what}: {found.reason}")
                say(f"{found.reason}\n")
            else:
                rounds.append(found)
                say(f"{figure(step_seconds(found, request.completions))} s a step\n")
    return results


def _of_a_round(results: Results, cores: Cores) -> Iterator[tuple[str, Plan, list[Measured]]]:
    """What is measured, how, and where it belongs."""
    request = results.request
    generator, trainer = split_cores(cores)
    yield "the generator alone", request.plan("generator", generator, 0.0), results.generator
    yield _sync_on(generator), request.plan("sync", generator, 0.0), results.sync_on_generator_part
    if len(trainer) == len(generator):
        results.sync_on_trainer_part = results.sync_on_generator_part
    else:
        yield _sync_on(trainer), request.plan("sync", trainer, 0.0), results.sync_on_trainer_part
    for latency in sorted(request.latencies):
        of = f", rewards of {latency:g} s"
        yield f"sync{of}", request.plan("sync", cores, latency), results.sync.setdefault(latency, [])
        yield f"async{of}", request.plan("async", cores, latency), results.asynchronous.setdefault(latency, [])


def _sync_on(part: Cores) -> str:
    return f"sync on {len(part)} core{'s' * (len(part) > 1)}"
