"""`python -m trl_moe_ext.bench`: one training step of a decoder layer, peers side by side."""

from __future__ import annotations

import argparse
import statistics

from rich.console import Console
from rich.table import Table

from trl_moe_ext.bench.measure import Measured, Plan, measure_in_process
from trl_moe_ext.bench.peers import PEERS
from trl_moe_ext.bench.shapes import SHAPES

_DEFAULT_PEERS = ["frozen", "moe_lora", "peft_grouped_mm"]


def main() -> None:
    """Measure every peer in turn, in interleaved rounds, and print times, memory and ratios to moe_lora."""
    parser = argparse.ArgumentParser(prog="python -m trl_moe_ext.bench", description=__doc__)
    parser.add_argument(
        "--peers", nargs="+", default=_DEFAULT_PEERS, choices=list(PEERS), metavar="PEER", help=", ".join(PEERS)
    )
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=list(SHAPES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="timed steps in each round")
    parser.add_argument("--rounds", type=int, default=3, help="how often each peer runs in a new process")
    args = parser.parse_args()
    results: dict[str, list[Measured]] = {peer: [] for peer in args.peers}
    for _ in range(args.rounds):
        for peer in args.peers:
            plan = Plan(args.shape, peer, args.dtype, args.rank, args.tokens, args.steps)
            results[peer].append(measure_in_process(plan))
    sizes = SHAPES[args.shape].description
    title = f"One training step of {args.shape}, {args.tokens} tokens, {args.dtype}, {sizes}, r={args.rank}"
    console = Console()
    # In a file or a pipe a row stays one line.
    console.width = console.width if console.is_terminal else 120
    console.print(_table(title, results))


def _table(title: str, results: dict[str, list[Measured]]) -> Table:
    table = Table(title=title)
    for column in ("peer", "time of a step", "extra memory", "time / moe_lora", "memory / moe_lora"):
        table.add_column(column, justify="left" if column == "peer" else "right", no_wrap=True)
    ours = _summary(results["moe_lora"]) if "moe_lora" in results else None
    for peer, rounds in results.items():
        time, memory = _summary(rounds)
        row = [peer, "{1:.0f} ms ({0:.0f}-{2:.0f})".format(*time), "{1:.0f} MB ({0:.0f}-{2:.0f})".format(*memory)]
        table.add_row(*row, *([f"{time[1] / ours[0][1]:.2f}", f"{memory[1] / ours[1][1]:.2f}"] if ours else ["", ""]))
    return table


def _summary(rounds: list[Measured]) -> tuple[list[float], list[float]]:
    """Lowest, median and highest of the rounds: median milliseconds of a step, megabytes over the idle model."""
    milliseconds = [1e3 * measured.median for measured in rounds]
    megabytes = [measured.extra_bytes / 1e6 if measured.extra_bytes else float("nan") for measured in rounds]
    return _spread(milliseconds), _spread(megabytes)


def _spread(values: list[float]) -> list[float]:
    return [min(values), statistics.median(values), max(values)]


if __name__ == "__main__":
    main()
