"""`trl-moe bench grpo`: how much faster GRPO is when generation, rewards and training go on at the same time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trl_moe_ext.cli.bench_output import JsonOption, RankOption, fail_for
from trl_moe_ext.cli.console import show
from trl_moe_ext.cli.output_file import check_writable
from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_moe_ext.bench.grpo.plan import Request


def grpo(
    model: Annotated[str, typer.Argument(help="Directory of a checkpoint.")] = "configs/quickstart/model",
    latency: Annotated[
        str, typer.Option(help="Seconds that a call of the reward function takes; several separated by commas.")
    ] = "0,1",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of a step; each is a group, scored by one call.")] = 4,
    num_generations: Annotated[int, typer.Option("--num_generations", min=2, help="Completions of each prompt.")] = 8,
    completion_length: Annotated[
        int, typer.Option("--completion_length", min=2, help="Tokens of every completion; none ends before.")
    ] = 64,
    rank: RankOption = 16,
    steps: Annotated[int, typer.Option(min=1, help="Timed optimizer steps in a round.")] = 12,
    warm_up: Annotated[int, typer.Option("--warm_up", min=1, help="Optimizer steps before the timed ones.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="How often each side is measured, in a new process.")] = 3,
    max_staleness: Annotated[
        int, typer.Option("--max_staleness", min=0, help="max_staleness of the asynchronous side.")
    ] = 4,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls of the reward function at once, on both sides.")] = 8,
    json_path: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file for the timeline of the last async run.")] = None,
) -> None:
    """GRPO on a CPU: generation, rewards and training one after the other, and at the same time."""
    from trl_moe_ext.bench.grpo.plan import Request
    from trl_moe_ext.cli.build_model import load_config, model_directory

    load_config(model)  # says what is wrong with it
    request = Request(
        model=model_directory(model),
        latencies=_seconds(latency),
        prompts=prompts,
        num_generations=num_generations,
        completion_length=completion_length,
        rank=rank,
        steps=steps,
        warm_up=warm_up,
        rounds=rounds,
        max_staleness=max_staleness,
        concurrency=concurrency,
    )
    _bench(request, json_path, plot)


def _bench(request: Request, json_path: str | None, plot: Path | None) -> None:
    """Measure, and tell in all the ways that are asked for."""
    from trl_moe_ext.bench.grpo.run import run, usable_cores
    from trl_moe_ext.bench.grpo.table import notes, tables, title
    from trl_moe_ext.bench.machine import machine

    cores = usable_cores()
    for path in (json_path if json_path != "-" else None, plot):
        check_writable(path)
    results = run(request, cores, lambda text: typer.echo(text, nl=False, err=True), plot)
    facts = machine("cpu")
    facts["device"]["torch_threads"] = len(cores)  # of the measured processes, not of this one
    text = json.dumps({**results.as_dict(), **facts}, indent=2)
    if json_path == "-":
        typer.echo(text)
    else:
        typer.echo(f"{title(results)}\n")
        for table in tables(results):
            show(table, is_folded=False)
        for note in notes(results, facts):
            typer.echo(note)
        if json_path is not None:
            Path(json_path).write_text(text + "\n")
    fail_for(results.failures)


def _seconds(words: str) -> tuple[float, ...]:
    """The times in a list with commas."""
    try:
        found = tuple(dict.fromkeys(float(word) for word in words.split(",")))
    except ValueError as error:
        raise ConfigError(f"--latency {words!r} is not a list of seconds, such as 0,1.0") from error
    if not all(0 <= latency < 600 for latency in found):
        raise ConfigError(f"--latency {words!r}: use seconds from 0 to 600")
    return found
