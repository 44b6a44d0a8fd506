"""TRL's async GRPO, from wherever the installed version keeps it: experimental in 1.16, stable from 1.18 on."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

from trl_moe_ext.errors import HostVersionError

__all__ = [
    "AsyncGRPOConfig",
    "AsyncGRPOTrainer",
    "DataCollatorForRollout",
    "FixedCountBatcher",
    "RolloutQueueDataset",
    "RolloutSample",
    "TreeRow",
    "packing_module",
    "trainer_module",
]

_EXPERIMENTAL, _STABLE = "trl.experimental.async_grpo", "trl.trainer"


def _module(*candidates: str) -> ModuleType:
    """The first of the modules that is there."""
    with warnings.catch_warnings():
        # That its place may change is what this module is for.
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        for name in candidates:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name is None or not name.startswith(error.name):
                    raise
    raise HostVersionError(
        f"the installed trl has its async GRPO in none of {', '.join(candidates)}; install trl 1.16, which this "
        "version of trl_moe_ext was made for"
    )


def _names(module: ModuleType, *names: str) -> tuple[type, ...]:
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise HostVersionError(
            f"{module.__name__} has no {', '.join(missing)}; install trl 1.16, which this version of trl_moe_ext was "
            "made for"
        )
    return tuple(getattr(module, name) for name in names)


trainer_module = _module(f"{_EXPERIMENTAL}.async_grpo_trainer", f"{_STABLE}.async_grpo_trainer")
packing_module = _module(f"{_EXPERIMENTAL}.packing", f"{_STABLE}.async_grpo_packing", f"{_STABLE}.packing")

if TYPE_CHECKING:
    from trl.experimental.async_grpo.async_grpo_trainer import (
        AsyncGRPOConfig,
        AsyncGRPOTrainer,
        DataCollatorForRollout,
        FixedCountBatcher,
        RolloutQueueDataset,
        RolloutSample,
        TreeRow,
    )
else:
    AsyncGRPOConfig, AsyncGRPOTrainer, DataCollatorForRollout, FixedCountBatcher, RolloutQueueDataset = _names(
        trainer_module,
        "AsyncGRPOConfig",
        "AsyncGRPOTrainer",
        "DataCollatorForRollout",
        "FixedCountBatcher",
        "RolloutQueueDataset",
    )
    RolloutSample, TreeRow = _names(trainer_module, "RolloutSample", "TreeRow")
