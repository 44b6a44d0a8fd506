"""The rows that a run trains on, from the options that the training scripts of TRL have for it."""

from __future__ import annotations

from typing import Any

import datasets
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from trl_moe_ext.errors import ConfigError, near_matches

__all__ = ["training_data"]


def training_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> Any:
    """The split to train on, of a path, a name on the Hub or a mixture.

    Raises:
        ConfigError: none is given, or two; it cannot be loaded; or it has no such split.
    """
    if mixture.datasets and script.dataset_name:
        raise ConfigError(f"--dataset_name {script.dataset_name} and `datasets` exclude each other; leave one out")
    if not mixture.datasets and not script.dataset_name:
        raise ConfigError("--dataset_name is not given; add the folder or the name of a dataset with prompts")
    try:
        splits = (
            get_dataset(mixture)
            if mixture.datasets
            else datasets.load_dataset(
                script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming
            )
        )
    except StopIteration as error:
        raise ConfigError(f"--dataset_name {script.dataset_name} has a file without rows; remove it") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        name = "datasets" if mixture.datasets else f"--dataset_name {script.dataset_name}"
        raise ConfigError(f"{name} cannot be loaded: {str(error).strip() or type(error).__name__}") from error
    if script.dataset_train_split not in splits:
        raise ConfigError(
            f"--dataset_train_split {script.dataset_train_split}: the dataset has no such split; "
            f"{near_matches(script.dataset_train_split, map(str, splits))}"
        )
    return splits[script.dataset_train_split]
