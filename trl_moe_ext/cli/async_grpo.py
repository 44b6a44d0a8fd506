"""`trl-moe async-grpo`: GRPO that generates while it trains, from flags and YAML as `trl grpo` takes them."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from trl_moe_ext.cli.async_grpo_arguments import Arguments

# The generator gave up, say: not a mistake of the user.
FAILURE_EXIT_CODE = 1
# What a shell reports for a process that a signal ended.
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
RESUME = "--resume_from_checkpoint"

# All options are those of the parser of TRL, `--help` included.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def async_grpo(context: typer.Context) -> None:
    """Train an adapter by GRPO, generating meanwhile; options as for `trl grpo`: --config, --help and the rest."""
    from trl_moe_ext.cli.async_grpo_arguments import parse

    words = list(context.args)
    with _orderly_end(words) as end:
        arguments = parse(words)
        end["output_dir"] = arguments.training.output_dir
        _train(arguments)


def _train(arguments: Arguments) -> None:
    from trl_moe_ext.cli.async_grpo_arguments import last_or_path, model_options, peft_config
    from trl_moe_ext.cli.named_rewards import reward_functions
    from trl_moe_ext.cli.training_data import training_data

    training, script = arguments.training, arguments.script
    resume = last_or_path(training.resume_from_checkpoint)
    training.model_init_kwargs = model_options(arguments)
    rewards = reward_functions(script.reward_funcs)
    adapter = peft_config(arguments.model)
    trainer = _trainer_class()(
        model=arguments.model.model_name_or_path,
        reward_funcs=rewards,
        args=training,
        train_dataset=training_data(script, arguments.mixture),
        peft_config=adapter,
        callbacks=_reports(),
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.end()


def _trainer_class() -> Any:
    from trl_moe_ext.grpo.trainer import AsyncMoeGRPOTrainer

    return AsyncMoeGRPOTrainer


def _reports() -> list[Any]:
    from trl_moe_ext.reporting.callback import RunSummaryCallback
    from trl_moe_ext.reporting.record_callback import RunRecordCallback

    return [RunRecordCallback(), RunSummaryCallback()]


@contextmanager
def _orderly_end(words: Sequence[str]) -> Iterator[dict[str, str]]:
    """Turn what ends a run into an exit code, and tell how it goes on where there is a checkpoint.

    The dictionary is for the ``output_dir``, as soon as it is known.
    """
    known: dict[str, str] = {}
    try:
        yield known
    except KeyboardInterrupt:
        _tell_how_to_go_on(words, known)
        raise typer.Exit(INTERRUPTED) from None
    except SystemExit as end:
        if end.code == TERMINATED:
            _tell_how_to_go_on(words, known)
        raise
    except Exception as error:
        if not _is_failure_of_the_generator(error):
            raise
        typer.echo(f"trl-moe: error: {' '.join(str(error).split())}", err=True)
        _tell_how_to_go_on(words, known)
        raise typer.Exit(FAILURE_EXIT_CODE) from error


def _is_failure_of_the_generator(error: Exception) -> bool:
    from trl_moe_ext.grpo.backends.protocol import BackendError
    from trl_moe_ext.grpo.rollout.supervisor import RolloutError

    return isinstance(error, BackendError | RolloutError)


def _tell_how_to_go_on(words: Sequence[str], known: dict[str, str]) -> None:
    from trl_moe_ext.grpo.checkpoint import last_whole_checkpoint

    # Of several processes the first one speaks.
    if "output_dir" not in known or os.environ.get("RANK", "0") != "0":
        return
    try:
        checkpoint = last_whole_checkpoint(Path(known["output_dir"]))
    except ConfigError:
        typer.echo("There is no checkpoint yet: the run begins anew next time.", err=True)
        return
    command = shlex.join(["trl-moe", "async-grpo", *_without_resume(words), RESUME, "true"])
    if os.environ.get("WORLD_SIZE", "1") != "1":
        command = f"the same command with {RESUME} true"
    typer.echo(f"Checkpoint: {checkpoint}\nResume:     {command}", err=True)


def _without_resume(words: Sequence[str]) -> list[str]:
    """The words without `--resume_from_checkpoint` and its value, in whatever spelling."""
    kept: list[str] = []
    skips = False
    for word in words:
        name, is_assigned, _ = word.partition("=")
        if name.replace("-", "_") == RESUME.replace("-", "_"):
            skips = not is_assigned
        elif skips:
            skips = False
        else:
            kept.append(word)
    return kept
