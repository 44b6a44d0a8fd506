"""What all commands of `trl-moe bench` have in common: two options, and how a failed measurement ends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

__all__ = ["FAILURE_EXIT_CODE", "JsonOption", "RankOption", "fail_for"]

# A kernel differs, or a measurement failed: not a mistake of the user.
FAILURE_EXIT_CODE = 1

RankOption = Annotated[int, typer.Option(min=1, help="Rank of the LoRA factors.")]
JsonOption = Annotated[
    str | None, typer.Option("--json", help="JSON file for all results; - prints them as JSON instead of tables.")
]


def fail_for(failures: Iterable[str]) -> None:
    """Tell what was not measured; the command ends with an exit code of its own if there is something."""
    failures = list(failures)
    for failure in failures:
        typer.echo(f"trl-moe: error: {failure}", err=True)
    if failures:
        raise typer.Exit(FAILURE_EXIT_CODE)
