"""The files around an upcycled checkpoint: reading the dense one, and an output directory that appears whole."""

from __future__ import annotations

import importlib.util
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from trl_moe_ext.errors import ConfigError, some_of

__all__ = ["appearing_whole", "check_output", "copy_companions", "load_model", "read_settings"]

# Files that travel with the weights unchanged.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "LICENSE*",
)


def read_settings(directory: Path, gguf_file: str | None) -> dict[str, Any]:
    """The configuration of a checkpoint as plain values.

    Raises:
        ConfigError: the directory or the file is missing or unreadable, or `gguf` is not installed.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is not a directory; give a checkpoint directory with config.json and weights")
    wanted = gguf_file or "config.json"
    if not (directory / wanted).is_file():
        others = sorted(path.name for path in directory.glob("*.gguf"))
        hint = f"; it has {', '.join(others)}: name one with --gguf-file" if others else ""
        raise ConfigError(f"{directory} has no {wanted}{hint}")
    if gguf_file and importlib.util.find_spec("gguf") is None:
        raise ConfigError("reading a GGUF file needs the package gguf: pip install gguf")
    with _unreadable(directory):
        settings, _ = PreTrainedConfig.get_config_dict(directory, gguf_file=gguf_file)
    return dict(settings)


def load_model(directory: Path, dtype: torch.dtype | str, **kwargs: Any) -> Any:
    """A causal language model from a local directory, with every weight found there.

    Args:
        directory: the checkpoint.
        dtype: of the weights; ``"auto"`` is that of the files.
        kwargs: for `from_pretrained`.

    Raises:
        ConfigError: the files cannot be read, or weights are missing or have other shapes.
    """
    with _unreadable(directory):
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, with their shapes
            output_loading_info=True,
            **kwargs,
        )
    problems = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    for key, found, wanted in sorted(info["mismatched_keys"]):
        problems.append(f"{key} is {tuple(found)} instead of {tuple(wanted)}")
    if problems:
        raise ConfigError(f"{directory} does not fit {type(model).__name__}: {some_of(problems, '; ')}")
    return model


@contextmanager
def _unreadable(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"cannot read the checkpoint in {directory}: {error}") from error


def check_output(dense_dir: Path, out_dir: Path, overwrite: bool) -> None:
    """Refuses, before any work, an output directory that must not be replaced.

    Raises:
        ConfigError: it has files and `overwrite` is false, it is a file, or it holds the input.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ConfigError(f"{out_dir} is a file; give a directory")
    if dense_dir.resolve().is_relative_to(out_dir.resolve()):
        raise ConfigError(f"{out_dir} holds the dense checkpoint; give another directory")
    if out_dir.is_dir() and any(out_dir.iterdir()) and not overwrite:
        raise ConfigError(f"{out_dir} is not empty; give another directory or add --overwrite")


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """A hidden directory beside `directory` that takes its place when the block ends without an error.

    Raises:
        ConfigError: it cannot be created.
    """
    tag = secrets.token_hex(4)
    partial = directory.with_name(f".{directory.name}.partial-{tag}")
    replaced = directory.with_name(f".{directory.name}.replaced-{tag}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {directory.parent}: {error.strerror}") from error
    try:
        yield partial
        if directory.exists():
            directory.rename(replaced)
        partial.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_companions(source: Path, target: Path, gguf_file: str | None) -> None:
    """Puts tokenizer, chat template and generation settings beside the new weights; a GGUF file contains them."""
    if gguf_file:
        AutoTokenizer.from_pretrained(source, gguf_file=gguf_file).save_pretrained(target)
        return
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, target / path.name)
            else:
                shutil.copy(path, target / path.name)
