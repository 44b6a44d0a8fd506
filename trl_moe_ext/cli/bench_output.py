"""What the commands of `trl-moe bench` have in common: options, files, and how a failed measurement ends."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from trl_moe_ext.errors import ConfigError

__all__ = ["FAILURE_EXIT_CODE", "JsonOption", "RankOption", "check_writable", "fail_for"]

# A kernel differs, or a measurement failed: not a mistake of the user.
FAILURE_EXIT_CODE = 1

RankOption = Annotated[int, typer.Option(min=1, help="Of all low-rank factors.")]
JsonOption = Annotated[str | None, typer.Option("--json", help="File for everything; - prints it and no table.")]


def fail_for(failures: Iterable[str]) -> None:
    """Tell what was not measured; the command ends with an exit code of its own if there is something."""
    failures = list(failures)
    for failure in failures:
        typer.echo(f"trl-moe: error: {failure}", err=True)
    if failures:
        raise typer.Exit(FAILURE_EXIT_CODE)


def check_writable(path: str | Path | None) -> None:
    """Refuse a file that could not be written when all is measured."""
    if path is None:
        return
    if Path(path).is_dir():
        raise ConfigError(f"{path} is a directory; give the name of a file")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{Path(path).absolute().parent} is not a directory: {path} cannot be written")
