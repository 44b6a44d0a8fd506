"""`trl-moe profile`: which experts a data set uses, as a file, a picture and a table."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trl_moe_ext.cli.bench_output import check_writable
from trl_moe_ext.cli.console import show
from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_moe_ext.profiles.profile import ExpertProfile

# What a shell reports for a process that Ctrl-C ended.
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Source:
    """Where the rows come from, in the words of the options of `profile`."""

    dataset: str
    config: str | None
    split: str
    text_column: str
    streaming: bool

    def __str__(self) -> str:
        return f"{self.dataset}{f' ({self.config})' if self.config else ''}, split {self.split}"


def profile(
    model: Annotated[str, typer.Argument(help="Directory of a checkpoint, or a name on the Hub.")],
    dataset: Annotated[str, typer.Option(help="Directory of a data set, or a name on the Hub.")],
    dataset_config: Annotated[str | None, typer.Option("--dataset_config", help="Its configuration.")] = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "train",
    text_column: Annotated[
        str, typer.Option("--text_column", help="Of rows that are no chats and no prompts with completions.")
    ] = "text",
    streaming: Annotated[bool, typer.Option("--streaming", help="Do not download all of the data set.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="How many to run, without padding.")] = 200_000,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("profile.json"),
    plot: Annotated[
        Path | None, typer.Option(help="Picture to write. [default: beside --out, .png]", show_default=False)
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Directory of an adapter to run the model with.")] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Rows of a forward.")] = 4,
    max_length: Annotated[int, typer.Option("--max_length", min=1, help="Longest row, in tokens.")] = 1024,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"], typer.Option(help="auto: as the model is saved.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda:1; auto: all GPUs, or the CPU.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Run the code that comes with the model.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Machine-readable: one object, see docs/experts.md.")
    ] = False,
) -> None:
    """Measure how much each expert of a model is used on a data set."""
    plot = out.with_suffix(".png") if plot is None else plot
    _check_files(out, plot)
    if adapter is not None and trust_remote_code:
        raise ConfigError("--trust_remote_code has no effect with --adapter; leave one of them out")
    source = Source(dataset, dataset_config, split, text_column, streaming)
    with _one_line_for_ctrl_c():
        loaded, tokenizer, rows = _load(model, source, adapter, dtype, device, trust_remote_code)
        found = _measure(loaded, tokenizer, rows, source, model, tokens, batch_size, max_length)
    _write(found, out, plot)
    if found.tokens < tokens:
        typer.echo(f"The data set has only {found.tokens:,} tokens; --tokens asks for {tokens:,}.", err=True)
    remote = ["--trust_remote_code"] if trust_remote_code else []
    _report(found, out, plot, [*_next_command(found, source, model, out), *remote], as_json)


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
    rows = _rows(source)
    device_or_none = None if device == "auto" else device
    return *load_model(model, config, adapter, dtype, device_or_none, trust_remote_code), rows


def _rows(source: Source) -> Iterable[dict[str, Any]]:
    from trl import DatasetMixtureConfig, ScriptArguments

    from trl_moe_ext.cli.training_data import training_data

    if Path(source.dataset).is_file():
        raise ConfigError(f"--dataset {source.dataset} is a file; give its directory, as for `trl sft`")
    script = ScriptArguments(
        dataset_name=source.dataset,
        dataset_config=source.config,
        dataset_train_split=source.split,
        dataset_streaming=source.streaming,
    )
    try:
        rows: Iterable[dict[str, Any]] = training_data(script, DatasetMixtureConfig())
    except ConfigError as error:  # in the names that the options of TRL have
        told = str(error).replace("--dataset_name", "--dataset").replace("--dataset_train_split", "--split")
        raise ConfigError(told) from error
    return rows


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


def _write(found: ExpertProfile, out: Path, plot: Path) -> None:
    from trl_moe_ext.profiles.plots import save_profile_plot

    try:
        found.save(out)
        save_profile_plot(found, plot)
    except OSError as error:
        raise ConfigError(f"{error.filename or out} cannot be written: {error.strerror}") from error


def _next_command(found: ExpertProfile, source: Source, model: str, out: Path) -> list[str]:
    """The arguments that train the most used quarter of the experts."""
    from trl_moe_ext.cli.build_model import model_directory
    from trl_moe_ext.profiles.coverage import quarter

    directory = model_directory(model)
    return [
        *("trl", "sft", "--model_name_or_path", directory, "--dataset_name", source.dataset),
        *(["--dataset_config", source.config] if source.config else []),
        *(["--dataset_train_split", source.split] if source.split != "train" else []),
        *(["--dataset_text_field", source.text_column] if source.text_column != "text" else []),
        # Nobody knows how many rows a stream has.
        *(["--dataset_streaming", "--max_steps", "1000"] if source.streaming else []),
        *("--peft_type", "moe_lora", "--moe_expert_selection", f"profile:{out}"),
        *("--moe_experts_per_layer", str(quarter(max(layer.num_experts for layer in found.layers)))),
        *("--output_dir", f"out/{Path(directory).resolve().name}"),
    ]


def _report(found: ExpertProfile, out: Path, plot: Path, command: list[str], as_json: bool) -> None:
    from trl_moe_ext.cli.profile_view import left_out_lines, profile_table
    from trl_moe_ext.profiles.coverage import coverage_of, judgement

    layers = [coverage_of(layer) for layer in found.layers]
    if as_json:
        facts = {"out": str(out), "plot": str(plot), "judgement": judgement(found), "command": shlex.join(command)}
        coverage = [asdict(layer) for layer in layers]
        typer.echo(json.dumps({**facts, "coverage": coverage, "profile": found.to_dict()}, indent=1))
        return
    typer.echo(f"{found.model}: use of the experts by {found.tokens:,} tokens of {found.dataset}")
    show(profile_table(layers))
    for line in left_out_lines(found):
        typer.echo(line)
    typer.echo(f"{judgement(found)}\n\nProfile: {out}\nPicture: {plot}\n")
    typer.echo(f"To train the most used quarter of the experts:\n{shlex.join(command)}")
