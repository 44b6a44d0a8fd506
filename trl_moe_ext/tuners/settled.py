"""The configuration of an adapter with what its model has made of it."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig

from trl_moe_ext.tuners.targets.options import TargetOptions

__all__ = ["settled"]


def settled(config: PeftConfig) -> PeftConfig:
    """A copy that makes the same adapter again without a profile, as one that was loaded from the adapter's file does.

    What is not saved, such as the kernel, is as it was. Configurations of other packages are returned as they are.

    Args:
        config: of an adapter that is on a model.
    """
    if not isinstance(config, TargetOptions):
        return config
    saved: dict[str, Any] = config.to_dict()  # type: ignore[attr-defined]  # of PEFT
    copied = copy.copy(config)
    # Names of the model's parts, for the model that has the adapter.
    vars(copied).pop("resolved", None)
    for name in ("saved_with", "rank_pattern"):  # ranks by a profile; the experts that it chose are in a field
        if name in saved:
            setattr(copied, name, saved[name])
    return copied
