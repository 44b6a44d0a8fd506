"""`trl-moe report`: one HTML page of a run, which opens without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trl_moe_ext.errors import ConfigError


def report(
    run_dir: Annotated[Path, typer.Argument(help="The output_dir of a training run, or one of its checkpoints.")],
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="report.html in RUN_DIR")] = None,
) -> None:
    """Make one HTML page of a run: loss, load of the experts, what was adapted, speed, memory, settings."""
    from trl_moe_ext.files import write_atomically
    from trl_moe_ext.reporting.page import read_run, render_page

    run = read_run(run_dir)
    target = run_dir / "report.html" if out is None else out
    if target.is_dir():
        raise ConfigError(f"--out {target} is a directory; give the name of a file")
    try:
        write_atomically(target, render_page(run))
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror}; choose another place with --out") from error
    if run.note:
        typer.echo(run.note, err=True)
    typer.echo(f"Report: {target}")
