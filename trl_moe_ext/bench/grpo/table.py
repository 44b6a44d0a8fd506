"""The results as tables, and in words how to read them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from trl_moe_ext.bench.figures import figure
from trl_moe_ext.bench.grpo.results import Comparison, Results
from trl_moe_ext.bench.machine import in_words
from trl_moe_ext.bench.results import Spread

__all__ = ["notes", "tables", "title"]


def title(results: Results) -> str:
    """What was measured, in a line."""
    request = results.request
    return (
        f"GRPO of {request.model}, r={request.rank}: {request.completions} completions of "
        f"{request.completion_length} tokens a step, {request.num_generations} for each prompt"
    )


def tables(results: Results) -> Iterator[Table]:
    """Both sides, and what the bound is made of; nothing if nothing was measured."""
    found = results.comparisons()
    if found:
        yield _sides(found)
        yield _parts(found)


def _sides(found: list[Comparison]) -> Table:
    columns = {
        "sync\ns a step": lambda c: _spread(c.sync),
        "async\ns a step": lambda c: _spread(c.asynchronous),
        "ratio": lambda c: f"{c.ratio:.2f}",
        "bound": lambda c: f"{c.bound:.2f}",
        "of the\nbound": lambda c: f"{c.share_of_bound:.0%}",
        "sync\ntokens/s": lambda c: figure(c.sync_tokens),
        "async\ntokens/s": lambda c: figure(c.async_tokens),
        "trainer\nwaits": lambda c: f"{c.trainer_wait:.0%}",
        "generator\nidle": lambda c: f"{c.generator_idle:.0%}",
    }
    return _table("One after the other, and at the same time", columns, found)


def _parts(found: list[Comparison]) -> Table:
    columns = {
        "generation\nall cores": lambda c: _seconds(c.costs.generation),
        "reward\nwait": lambda c: _seconds(c.costs.reward_wait),
        "training\nall cores": lambda c: _seconds(c.costs.training),
        "generation\non its part": lambda c: _seconds(c.costs.generation_on_part),
        "generator\non its part": lambda c: _seconds(c.costs.generator_on_part),
        "rewards /\nconcurrency": lambda c: _seconds(c.costs.reward_calls / c.costs.concurrency),
        "training\non its part": lambda c: _seconds(c.costs.training_on_part),
        "bound of\noverlap": lambda c: f"{c.bound_of_overlap:.2f}",
    }
    return _table("What the bound is made of, seconds of a step", columns, found)


def _table(heading: str, columns: dict[str, Any], found: list[Comparison]) -> Table:
    table = Table(title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("latency of\na reward", no_wrap=True, vertical="bottom")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for comparison in found:
        table.add_row(f"{comparison.latency:g} s", *(tell(comparison) for tell in columns.values()))
    return table


def _spread(found: Spread) -> str:
    return f"{_seconds(found.median)} ({_seconds(found.low)}-{_seconds(found.high)})"


def _seconds(value: float) -> str:
    """Three digits, as steps may take milliseconds."""
    return f"{value:.3f}" if value < 10 else figure(value)


def notes(results: Results, facts: dict[str, Any]) -> Iterator[str]:
    """What was not measured and why, how to read the tables, and where they come from, a line each.

    Args:
        facts: from `bench.machine.machine`.
    """
    request = results.request
    yield from (f"Not measured: {failure}." for failure in results.failures)
    rounds = f"{request.rounds} round{'s' * (request.rounds > 1)}"
    yield (
        f"Median (lowest-highest) of {rounds}, each side in a new process: {request.steps} steps after "
        f"{request.warm_up} to warm up; loading is left out. max_staleness {request.max_staleness}, at most "
        f"{request.concurrency} calls of the reward function at once, one for each prompt, on both sides."
    )
    yield (
        "Tokens are those of completions that are trained on. Bound: (generation + reward wait + training, all cores) "
        "over the slowest of the generator on its part of the cores, rewards / concurrency, and training on its part. "
        "The bound of overlap has the synchronous side's own generation on that part in the place of the generator, "
        "which keeps its engine from step to step and has completions of several steps under way."
    )
    yield "What is loaded is kept out of garbage collections, which transformers does in each generation."
    yield f"{in_words(facts)}."
