"""What `trl-moe profile` leaves behind: two files, a table, and the command that trains with them."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from trl_moe_ext.cli.console import show
from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_moe_ext.cli.profile_source import Source
    from trl_moe_ext.profiles.profile import ExpertProfile

__all__ = ["report", "training_command", "write"]


def write(found: ExpertProfile, out: Path, plot: Path) -> None:
    """Save the profile and its picture.

    Raises:
        ConfigError: one of them cannot be written.
    """
    from trl_moe_ext.profiles.plots import save_profile_plot

    try:
        found.save(out)
        save_profile_plot(found, plot)
    except OSError as error:
        raise ConfigError(f"{error.filename or out} cannot be written: {error.strerror}") from error


def training_command(
    found: ExpertProfile, source: Source, model: str, out: Path, trust_remote_code: bool
) -> list[str]:
    """The arguments that train the most used quarter of the experts.

    Args:
        found: the profile.
        source: of its rows.
        model: directory or name of the model that was profiled.
        out: file of the profile.
        trust_remote_code: whether the model comes with code of its own.
    """
    from transformers.utils import is_torch_bf16_gpu_available

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
        *(["--trust_remote_code"] if trust_remote_code else []),
        # TRL trains in bfloat16 unless it is told not to, and stops where there is no accelerator for it.
        *([] if is_torch_bf16_gpu_available() else ["--bf16", "false"]),
    ]


def report(found: ExpertProfile, out: Path, plot: Path, command: list[str], as_json: bool) -> None:
    """Print what was found, for people or as one JSON object.

    Args:
        found: the profile.
        out, plot: where it and its picture were written.
        command: of `training_command`.
        as_json: print the object and nothing else.
    """
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
