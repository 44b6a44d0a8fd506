"""The results as tables, and in words what is not in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich import box
from rich.table import Table

from trl_moe_ext.bench.figures import figure
from trl_moe_ext.bench.machine import in_words
from trl_moe_ext.bench.measure import WARM_UP_STEPS
from trl_moe_ext.bench.plan import ACCURACY_TOKENS
from trl_moe_ext.bench.process import Missing
from trl_moe_ext.bench.results import Results, Spread

T = TypeVar("T")

_WHAT = {
    "experts": "The routed experts of {source} alone",
    "layer": "One decoder layer of {source}",
    "step": "A training step of {source}",
}


def title(results: Results) -> str:
    """What was measured, in a line."""
    request = results.request
    what = _WHAT[request.kind].format(source=request.source)
    checkpointing = ", gradient checkpointing" if request.gradient_checkpointing else ""
    return f"{what}: {results.sizes.description}, {request.dtype}, r={request.rank}{checkpointing}"


def results_tables(results: Results) -> Iterator[Table]:
    """Time and memory for each number of tokens; then the errors, if the experts are alone."""
    for tokens in results.request.tokens:
        yield _measurements(results, tokens)
    if any(isinstance(found, dict) for found in results.errors.values()):
        yield _errors(results)


def _measurements(results: Results, tokens: int) -> Table:
    columns = ("ms of a step", "extra MB", "time /\nfrozen", "memory /\nfrozen", "time /\nmoe_lora", "trained\nMB")
    table = _table(f"{tokens:,} tokens", *columns)
    for row in (row for row in results.rows if row.tokens == tokens):
        table.add_row(
            row.peer,
            _spread(row.milliseconds),
            _spread(row.megabytes),
            _ratio(results.ratio(row, "frozen", "milliseconds")),
            _ratio(results.ratio(row, "frozen", "megabytes")),
            _ratio(results.ratio(row, "moe_lora", "milliseconds")),
            figure(row.trained_megabytes) if row.trained_megabytes else "-",
        )
    return table


def _errors(results: Results) -> Table:
    """Whatever the number of tokens: they were computed with one."""
    table = _table(f"Relative errors against float64, {ACCURACY_TOKENS} tokens", "output", "dX", "dA", "dB")
    for peer, found in results.errors.items():
        errors = found if isinstance(found, dict) else {}
        table.add_row(peer, *(f"{errors[n]:.1e}" if n in errors else "-" for n in ("output", "dX", "dA", "dB")))
    return table


def _table(heading: str, *columns: str) -> Table:
    table = Table(title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("peer", no_wrap=True, vertical="bottom")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _spread(found: Spread | None) -> str:
    return "-" if found is None else f"{figure(found.median)} ({figure(found.low)}-{figure(found.high)})"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def notes(results: Results, facts: dict[str, Any]) -> Iterator[str]:
    """What was not measured and why, how to read the tables, and where they come from, a line each.

    Args:
        facts: from `machine`.
    """
    for reason, rows in _grouped((row, row.missing) for row in results.rows):
        peers = ", ".join(dict.fromkeys(row.peer for row in rows))
        tokens = ", ".join(dict.fromkeys(f"{row.tokens:,}" for row in rows))
        yield f"Not measured: {peers}, {tokens} tokens. {reason}."
    for reason, names in _grouped(results.errors.items()):
        yield f"Errors not measured: {', '.join(names)}. {reason}."
    request = results.request
    yield (
        f"Median (lowest-highest) of {_count(request.rounds, 'round')}, each in a new process: forward and backward "
        f"of {_count(request.steps, 'step')} after {WARM_UP_STEPS} to warm up."
    )
    yield "Extra memory is the peak over the idle model; it holds the gradients of the trained parameters."
    yield "Trained MB are those of trained parameters, their gradients and the states that AdamW keeps of them."
    if any(isinstance(found, dict) for found in results.errors.values()):
        yield "dX is the gradient of the tokens, dA and dB are those of the low-rank factors, with B not zero."
    yield f"{in_words(facts)}."


def _grouped(found: Iterable[tuple[T, object]]) -> Iterable[tuple[str, list[T]]]:
    """Reason -> what is missing for it."""
    reasons: dict[str, list[T]] = {}
    for what, result in found:
        if isinstance(result, Missing):
            reasons.setdefault(result.reason, []).append(what)
    return reasons.items()


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
