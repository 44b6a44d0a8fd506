"""`trl-moe bench`: what expert LoRA costs on the user's own machine, beside the frozen model and stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trl_moe_ext.cli.bench_grpo import grpo
from trl_moe_ext.cli.bench_options import (
    DEFAULT_PEERS,
    CheckpointingOption,
    DeviceOption,
    DtypeOption,
    PeersOption,
    PlotOption,
    RoundsOption,
    ShapeOption,
    StepsOption,
    TokensOption,
    peer_names,
    token_counts,
)
from trl_moe_ext.cli.bench_output import FAILURE_EXIT_CODE, JsonOption, RankOption, fail_for
from trl_moe_ext.cli.console import show
from trl_moe_ext.cli.output_file import check_writable
from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_moe_ext.bench.plan import Request
    from trl_moe_ext.bench.results import Results

bench = typer.Typer(name="bench", invoke_without_command=True)


@bench.callback()
def options(
    context: typer.Context,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every kernel with the reference, on a GPU if there is one.")
    ] = False,
) -> None:
    """Measure expert LoRA on this machine: time, memory, accuracy, beside the frozen model and stock PEFT."""
    if check and context.invoked_subcommand:
        raise ConfigError(f"--check stands alone: leave out it or {context.invoked_subcommand!r}")
    if check:
        _check()
    elif not context.invoked_subcommand:
        typer.echo(context.get_help())


def _of_shape(kind: Literal["experts", "layer"]) -> Callable[..., None]:
    def command(
        shape: ShapeOption = "qwen3-30b-a3b",
        tokens: TokensOption = "512",
        dtype: DtypeOption = "bfloat16",
        rank: RankOption = 16,
        peers: PeersOption = DEFAULT_PEERS,
        rounds: RoundsOption = 3,
        steps: StepsOption = 3,
        device: DeviceOption = None,
        json_path: JsonOption = None,
        plot: PlotOption = None,
    ) -> None:
        from trl_moe_ext.bench.machine import choose_device
        from trl_moe_ext.bench.plan import Request

        where = choose_device(device)
        request = Request(kind, shape, peer_names(peers), token_counts(tokens), dtype, rank, rounds, steps, where)
        _bench(request, json_path, plot)

    return command


bench.command(
    "experts",
    help="Time and memory of the routed experts alone, with random routing, and the errors of their gradients.",
)(_of_shape("experts"))
bench.command(
    "layer",
    help="Time and memory of a training step of one decoder layer, between an embedding and a head of 1,024 tokens."
    "\n\nAttention gets LoRA whatever becomes of the experts, but with moe_esft_quarter.",
)(_of_shape("layer"))


@bench.command()
def step(
    model: Annotated[str, typer.Argument(help="Directory of a checkpoint with routed experts.")],
    tokens: TokensOption = "512",
    dtype: DtypeOption = "bfloat16",
    rank: RankOption = 16,
    peers: PeersOption = DEFAULT_PEERS,
    rounds: RoundsOption = 3,
    steps: StepsOption = 3,
    gradient_checkpointing: CheckpointingOption = True,
    device: DeviceOption = None,
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """Time and memory of a training step of a whole checkpoint: one sequence of random tokens, forward and backward.

    Attention gets LoRA whatever becomes of the experts, but with moe_esft_quarter.
    """
    from trl_moe_ext.bench.machine import choose_device
    from trl_moe_ext.bench.plan import Request
    from trl_moe_ext.cli.build_model import load_config, model_directory

    load_config(model)  # says what is wrong with it
    request = Request(
        "step",
        model_directory(model),
        peer_names(peers),
        token_counts(tokens),
        dtype,
        rank,
        rounds,
        steps,
        choose_device(device),
        gradient_checkpointing,
    )
    _bench(request, json_path, plot)


bench.command()(grpo)


def _bench(request: Request, json_path: str | None, plot: Path | None) -> None:
    """Measure, and tell in all the ways that are asked for."""
    from trl_moe_ext.bench.fit import sizes_of
    from trl_moe_ext.bench.machine import machine
    from trl_moe_ext.bench.run import run

    for path in (json_path if json_path != "-" else None, plot):
        check_writable(path)
    results = run(request, sizes_of(request), say=lambda text: typer.echo(text, nl=False, err=True))
    facts = machine(request.device)
    text = json.dumps({**results.as_dict(), **facts}, indent=2)
    if json_path == "-":
        typer.echo(text)
    else:
        _tell(results, facts)
        if json_path is not None:
            Path(json_path).write_text(text + "\n")
    if plot is not None:
        _plot(results, facts, plot)
    fail_for(results.failures)


def _tell(results: Results, facts: dict[str, Any]) -> None:
    from trl_moe_ext.bench.table import notes, results_tables, title

    typer.echo(f"{title(results)}\n")
    for table in results_tables(results):
        show(table, is_folded=False)  # a figure that is cut off is lost
    for note in notes(results, facts):
        typer.echo(note)


def _plot(results: Results, facts: dict[str, Any], path: Path) -> None:
    from trl_moe_ext.bench.plot import save_plot
    from trl_moe_ext.bench.table import title

    tokens = f", {results.request.tokens[0]:,} tokens" if len(results.request.tokens) == 1 else ""
    save_plot(results, f"{title(results)}{tokens}\n{facts['device']['name']}", path)


def _check() -> None:
    from trl_moe_ext.bench.check import check_kernels, check_view
    from trl_moe_ext.bench.machine import choose_device

    device = choose_device(None)
    findings = check_kernels(device)
    show(check_view(findings, device), is_folded=False)
    if not all(found.is_ok for found in findings):
        raise typer.Exit(FAILURE_EXIT_CODE)
