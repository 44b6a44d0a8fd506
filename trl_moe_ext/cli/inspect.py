"""`trl-moe inspect`: what a model is made of and what moe_lora would train of it, from config.json alone."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from trl_moe_ext.cli.console import show

# Not a mistake of the user, and not a failure of the command: the answer is no.
UNREAD_EXIT_CODE = 1


def inspect(
    model: Annotated[str, typer.Argument(help="Directory with a config.json, a config.json, or a name on the Hub.")],
    r: Annotated[int, typer.Option("--r", min=1, help="Rank of the adapters that are counted.")] = 16,
    expert_r: Annotated[
        int | None, typer.Option("--expert_r", min=1, help="Rank on routed experts; r if not given.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", help="Run the code that comes with the model.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Machine-readable: one object, see docs/inspect.md.")
    ] = False,
) -> None:
    """Tell what a model is made of and what each moe_target would train, without its weights."""
    from transformers.utils import logging

    from trl_moe_ext.cli.build_model import build_on_meta, load_config
    from trl_moe_ext.hosts.peft import register
    from trl_moe_ext.reporting.inspection import inspect_model, inspection_view

    logging.set_verbosity_error()  # remarks on how the model would run
    register()  # done already unless autoload is off
    built = build_on_meta(load_config(model, trust_remote_code), trust_remote_code)
    inspection = inspect_model(built, r, expert_r)
    command = None if inspection.unread_experts else _command(built, model, r, expert_r, trust_remote_code)
    if as_json:
        facts = {"model": model, **asdict(inspection), "command": shlex.join(command) if command else None}
        typer.echo(json.dumps(facts, indent=2))
    else:
        show(inspection_view(inspection))
        typer.echo(_advice(bool(inspection.unread_experts), command, r, expert_r))
    if inspection.unread_experts:
        raise typer.Exit(UNREAD_EXIT_CODE)


def _command(built: Any, model: str, r: int, expert_r: int | None, trust_remote_code: bool) -> list[str] | None:
    """The arguments that start a training run, or None if TRL does not train such a model on text."""
    from trl_moe_ext.cli.build_model import model_directory

    if not built.can_generate() or built.config.is_encoder_decoder:
        return None
    source = model_directory(model)
    return [
        *("trl", "sft", "--model_name_or_path", source, "--dtype", "bfloat16"),
        *(["--trust_remote_code"] if trust_remote_code else []),
        *("--dataset_name", "trl-lib/Capybara", "--peft_type", "moe_lora", "--lora_r", str(r)),
        *(["--moe_expert_r", str(expert_r)] if expert_r else []),
        *("--output_dir", f"out/{Path(source).resolve().name}"),
    ]


def _advice(is_unread: bool, command: list[str] | None, r: int, expert_r: int | None) -> str:
    if is_unread:
        return (
            "These experts cannot be adapted yet. Describe them in a record of a plug-in (hook\n"
            "register_experts_families, see docs/families.md); moe_target attention trains the rest."
        )
    if command is None:
        ranks = f"r={r}" + (f", expert_r={expert_r}" if expert_r else "")
        return (
            f"`trl sft` does not train this kind of model. In Python:\n  get_peft_model(model, MoeLoraConfig({ranks}))"
        )
    return "To train the default:\n" + _folded(command)


def _folded(command: list[str]) -> str:
    """`command` for a shell, an option a line, so that it can be copied from a terminal of any width."""
    starts = [0, *[index for index, word in enumerate(command) if word.startswith("--")][1:]]
    ends = [*starts[1:], len(command)]
    return " \\\n    ".join(shlex.join(command[start:end]) for start, end in zip(starts, ends, strict=True))
