"""`trl-moe bench`: what expert LoRA costs on the user's own machine, beside the frozen model and stock PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from trl_moe_ext.cli.bench_grpo import grpo
from trl_moe_ext.cli.bench_output import FAILURE_EXIT_CODE, JsonOption, RankOption, check_writable, fail_for
from trl_moe_ext.cli.console import show
from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_moe_ext.bench.plan import Request
    from trl_moe_ext.bench.results import Results

# The names in trl_moe_ext.bench.shapes and peers, which need torch: help must be quick. A test compares them.
SHAPES = (
    "qwen3-30b-a3b, gemma4-26b-a4b, gpt-oss-20b, mixtral-8x7b, olmoe, deepseek-v2-lite, llama4-scout, "
    "llama4-maverick, llama4-small"
)
PEERS = "frozen,moe_lora,moe_lora_none,moe_lora_off,peft_grouped_mm"
_PEERS_HELP = (
    "What to compare, separated by commas. frozen: stock transformers, experts not trained; moe_lora; moe_lora_none: "
    "with save_activations none; moe_lora_off: our kernel without an adapter; moe_lora:KERNEL: with another kernel; "
    "moe_lora_quarter: a quarter of the experts; moe_esft_quarter: their own weights; "
    "peft_grouped_mm: stock PEFT; peft_eager: stock PEFT expert by expert, which takes minutes where there are many. "
    f"[default: {PEERS.replace(',', ', ')}]"
)

ShapeOption = Annotated[str, typer.Option(help=f"One of {SHAPES}.")]
TokensOption = Annotated[str, typer.Option(help="Tokens of a step: a number, or several separated by commas.")]
DtypeOption = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the weights.")]
PeersOption = Annotated[str, typer.Option(help=_PEERS_HELP, show_default=False)]
RoundsOption = Annotated[int, typer.Option(min=1, help="How often each peer is measured, in a new process each time.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Timed steps in a round, after two to warm up.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1; a GPU if there is one.")]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="PNG file for a picture of time and memory.")]
CheckpointingOption = Annotated[
    bool,
    typer.Option("--gradient_checkpointing/--no-gradient_checkpointing", help="Compute activations again, as in TRL."),
]

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
        peers: PeersOption = PEERS,
        rounds: RoundsOption = 3,
        steps: StepsOption = 3,
        device: DeviceOption = None,
        json_path: JsonOption = None,
        plot: PlotOption = None,
    ) -> None:
        from trl_moe_ext.bench.machine import choose_device
        from trl_moe_ext.bench.plan import Request

        where = choose_device(device)
        request = Request(kind, shape, _names(peers), _numbers(tokens), dtype, rank, rounds, steps, where)
        _bench(request, json_path, plot)

    return command


bench.command("experts", help="Routed experts alone, with random routing; with the errors of their gradients.")(
    _of_shape("experts")
)
bench.command("layer", help="A step of one decoder layer, between an embedding and a head of 1,024 tokens.")(
    _of_shape("layer")
)


bench.command()(grpo)


@bench.command()
def step(
    model: Annotated[str, typer.Argument(help="Directory of a checkpoint with routed experts.")],
    tokens: TokensOption = "512",
    dtype: DtypeOption = "bfloat16",
    rank: RankOption = 16,
    peers: PeersOption = PEERS,
    rounds: RoundsOption = 3,
    steps: StepsOption = 3,
    gradient_checkpointing: CheckpointingOption = True,
    device: DeviceOption = None,
    json_path: JsonOption = None,
    plot: PlotOption = None,
) -> None:
    """A step of a whole checkpoint: one sequence of random tokens, forward and backward."""
    from trl_moe_ext.bench.machine import choose_device
    from trl_moe_ext.bench.plan import Request
    from trl_moe_ext.cli.build_model import load_config, model_directory

    load_config(model)  # says what is wrong with it
    request = Request(
        "step",
        model_directory(model),
        _names(peers),
        _numbers(tokens),
        dtype,
        rank,
        rounds,
        steps,
        choose_device(device),
        gradient_checkpointing,
    )
    _bench(request, json_path, plot)


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


def _names(words: str) -> tuple[str, ...]:
    """The peers in a list with commas."""
    from trl_moe_ext.bench.peers import peer_named

    names = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not names:
        raise ConfigError("--peers names none; give at least one")
    for name in names:
        peer_named(name)
    return names


def _numbers(words: str) -> tuple[int, ...]:
    """The numbers in a list with commas."""
    parts = [word.strip() for word in words.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--tokens {words!r} is not a list of numbers above zero, such as 128,512,2048")
    return tuple(dict.fromkeys(map(int, parts)))
