"""`trl-moe profile`: which experts a data set uses, as a file, a picture and a table."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trl_moe_ext.cli.output_file import check_writable
from trl_moe_ext.cli.profile_output import report, training_command, write
from trl_moe_ext.cli.profile_source import Source, rows_of
from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_moe_ext.profiles.profile import ExpertProfile

# What a shell reports for a process that Ctrl-C ended.
INTERRUPTED = 128 + signal.SIGINT


def profile(
    model: Annotated[str, typer.Argument(help="Directory of a checkpoint, or a name on the Hub.")],
    dataset: Annotated[str, typer.Option(help="Directory of a data set, or a name on the Hub.")],
    dataset_config: Annotated[
        str | None, typer.Option("--dataset_config", help="Configuration of the data set, if it has several.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    text_column: Annotated[
        str, typer.Option("--text_column", help="Column of texts, in rows without chats, prompts or token ids.")
    ] = "text",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read rows as they are needed, without downloading all of them first.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to run, padding not counted.")] = 200_000,
    out: Annotated[Path, typer.Option(help="File for the profile.")] = Path("profile.json"),
    plot: Annotated[
        Path | None, typer.Option(help="File for a picture of it.", show_default="that of --out, ending in .png")
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Directory of an adapter to run the model with.")] = None,
    batch_size: Annotated[
        int, typer.Option("--batch_size", min=1, help="Rows in a batch; fewer take less memory.")
    ] = 4,
    max_length: Annotated[
        int, typer.Option("--max_length", min=1, help="Tokens of a row that are run; the rest is cut off.")
    ] = 1024,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of the loaded weights; auto: as they are saved."),
    ] = "auto",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda:1; auto: all GPUs, or the CPU.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Run the code that comes with the model.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table, see docs/experts.md.")
    ] = False,
) -> None:
    """Measure how much each expert of a model is used on a data set.

    The model runs over the data and is not trained. The profile says for every
    layer which share of the choices each expert gets, and `trl sft` trains the
    most used ones with --moe_expert_selection profile:FILE. A table is printed,
    and the command that trains a quarter of the experts.
    """
    plot = out.with_suffix(".png") if plot is None else plot
    _check_files(out, plot)
    if adapter is not None and trust_remote_code:
        raise ConfigError("--trust_remote_code has no effect with --adapter; leave one of them out")
    source = Source(dataset, dataset_config, split, text_column, streaming)
    with _one_line_for_ctrl_c():
        loaded, tokenizer, rows = _load(model, source, adapter, dtype, device, trust_remote_code)
        found = _measure(loaded, tokenizer, rows, source, model, tokens, batch_size, max_length)
    write(found, out, plot)
    if found.tokens < tokens:
        typer.echo(f"The data set has only {found.tokens:,} tokens; --tokens asks for {tokens:,}.", err=True)
    command = training_command(found, source, model, out, trust_remote_code)
    report(found, out, plot, command, as_json)


def _check_files(out: Path, plot: Path) -> None:
    for path in (out, plot):
        check_writable(path)
    if out.absolute() == plot.absolute():
        raise ConfigError(f"--out {out} and the picture are the same file; give another name with --plot")


@contextmanager
def _one_line_for_ctrl_c() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("trl-moe profile: interrupted; nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _load(
    model: str, source: Source, adapter: Path | None, dtype: str, device: str, trust_remote_code: bool
) -> tuple[Any, Any, Iterable[dict[str, Any]]]:
    import datasets
    from transformers.utils import logging

    from trl_moe_ext.cli.profile_model import check_model, load_model

    logging.set_verbosity_error()  # remarks on how the model would run
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    config = check_model(model, trust_remote_code)
    rows = rows_of(source)
    device_or_none = None if device == "auto" else device
    return *load_model(model, config, adapter, dtype, device_or_none, trust_remote_code), rows


def _measure(
    loaded: Any,
    tokenizer: Any,
    rows: Iterable[dict[str, Any]],
    source: Source,
    model: str,
    tokens: int,
    batch_size: int,
    max_length: int,
) -> ExpertProfile:
    from trl_moe_ext.cli.profile_text import token_batches
    from trl_moe_ext.profiles.measure import measure_profile

    batches = token_batches(
        rows, tokenizer, text_column=source.text_column, batch_size=batch_size, max_length=max_length
    )
    with _progress(tokens) as on_batch:
        return measure_profile(loaded, batches, tokens, name=model, dataset=str(source), on_batch=on_batch)


@contextmanager
def _progress(tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, which goes when it is full; none where the standard error is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=tokens)
        yield lambda done: bar.update(task, completed=done)
