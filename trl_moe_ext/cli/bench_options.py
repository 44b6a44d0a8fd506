"""The options of `trl-moe bench experts`, `layer` and `step`, and how those that are lists are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from trl_moe_ext.errors import ConfigError

# The names in trl_moe_ext.bench.shapes and peers, which need torch: help must be quick. A test compares them.
SHAPES = (
    "qwen3-30b-a3b, gemma4-26b-a4b, gpt-oss-20b, mixtral-8x7b, olmoe, deepseek-v2-lite, llama4-scout, "
    "llama4-maverick, llama4-small"
)
DEFAULT_PEERS = "frozen,moe_lora,moe_lora_none,moe_lora_off,peft_grouped_mm"
# An empty line between two of them makes the help begin a new line.
_PEERS_HELP = "\n\n".join(
    (
        "Ways to train the experts that are compared, separated by commas:",
        "frozen: not at all, in stock transformers;",
        "moe_lora: our LoRA;",
        "moe_lora_none: the same with save_activations='none';",
        "moe_lora_off: its kernel without an adapter, the floor;",
        "moe_lora:KERNEL: with another kernel, see `trl-moe plugins`;",
        "moe_lora_quarter: LoRA on every fourth expert;",
        "moe_esft_quarter: the weights of every fourth expert;",
        "peft_grouped_mm: stock PEFT;",
        "peft_eager: stock PEFT expert by expert, which takes minutes where there are many.",
    )
)

ShapeOption = Annotated[
    str,
    typer.Option(help=f"Model whose sizes are taken; weights are random, nothing is downloaded. One of {SHAPES}."),
]
TokensOption = Annotated[
    str, typer.Option(help="Tokens in a step; each of several numbers, separated by commas, is measured.")
]
DtypeOption = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the frozen weights.")]
PeersOption = Annotated[str, typer.Option(help=_PEERS_HELP, show_default=DEFAULT_PEERS.replace(",", ", "))]
RoundsOption = Annotated[int, typer.Option(min=1, help="How often each peer is measured, in a new process each time.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Timed steps in a round, after two to warm up.")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="a GPU if there is one, else the CPU")
]
PlotOption = Annotated[Path | None, typer.Option("--plot", help="PNG file for a picture of time and memory.")]
CheckpointingOption = Annotated[
    bool,
    typer.Option(
        "--gradient_checkpointing/--no-gradient_checkpointing",
        help="Compute activations again in the backward pass instead of keeping them, as TRL does by default.",
    ),
]


def peer_names(words: str) -> tuple[str, ...]:
    """The peers in a list with commas."""
    from trl_moe_ext.bench.peers import peer_named

    names = tuple(dict.fromkeys(word.strip() for word in words.split(",") if word.strip()))
    if not names:
        raise ConfigError("--peers names none; give at least one")
    for name in names:
        peer_named(name)
    return names


def token_counts(words: str) -> tuple[int, ...]:
    """The numbers in a list with commas."""
    parts = [word.strip() for word in words.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--tokens {words!r} is not a list of numbers above zero, such as 128,512,2048")
    return tuple(dict.fromkeys(map(int, parts)))
