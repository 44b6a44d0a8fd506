"""The entry point of `trl-moe`: global options, the list of sub-commands, and how an error reaches the user."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from trl_moe_ext._version import __version__
from trl_moe_ext.cli.ask import ask
from trl_moe_ext.cli.async_grpo import CONTEXT, async_grpo
from trl_moe_ext.cli.bench import bench
from trl_moe_ext.cli.inspect import inspect
from trl_moe_ext.cli.plugins import plugins
from trl_moe_ext.cli.profile import profile
from trl_moe_ext.cli.report import report
from trl_moe_ext.cli.upcycle import upcycle
from trl_moe_ext.errors import MoeExtError

__all__ = ["app", "main"]

# As for the usage errors that the command-line parser finds itself.
EXIT_CODE = 2


class OneLineErrors(TyperGroup):
    """Shows an error that this package raises on purpose as one line; any other is a bug and keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except MoeExtError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"trl-moe: error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(EXIT_CODE) from error


app = typer.Typer(
    cls=OneLineErrors,
    help="LoRA on the routed experts of mixture-of-experts models, for TRL and PEFT."
    "\n\nThe usual training command is TRL's own: trl sft --peft_type moe_lora ... These are the tools beside it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(ask)
app.command(context_settings=CONTEXT)(async_grpo)
app.add_typer(bench)
app.command()(inspect)
app.command()(plugins)
app.command()(profile)
app.command()(report)
app.command()(upcycle)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"trl-moe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="TRL_MOE_DEBUG", help="Show the traceback of an error.")
    ] = False,
) -> None:
    """Options that stand before the sub-command."""


def main() -> None:
    """Run the command line; the process exits with 0, with 2 after a user's mistake, or with a traceback."""
    app()


if __name__ == "__main__":
    main()
