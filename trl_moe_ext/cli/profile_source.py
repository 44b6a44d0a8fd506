"""The data set that `trl-moe profile` runs: which one, and its rows as `trl sft` would read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_moe_ext.errors import ConfigError

__all__ = ["Source", "rows_of"]


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


def rows_of(source: Source) -> Iterable[dict[str, Any]]:
    """The rows, which a stream reads as they are taken.

    Raises:
        ConfigError: there is no such data set, or no such split of it.
    """
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
