"""The values of `--peft_type`, and what is said of one that is unknown or not ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_moe_ext.errors import ConfigError, near_matches
from trl_moe_ext.hosts.tuner_types import TUNERS

__all__ = ["MOE_TYPES", "PEFT_TYPES", "known_peft_type", "without_our_adapter"]

MOE_TYPES = tuple(tuner.option for tuner in TUNERS)
PEFT_TYPES = ("lora", *MOE_TYPES)


def known_peft_type(given: Any) -> str:
    """One of `PEFT_TYPES`; saved adapters have the type in capitals, and both spellings mean the same.

    Raises:
        ConfigError: there is no such type.
    """
    name = str(given).lower()
    if name not in PEFT_TYPES:
        raise ConfigError(f"--peft_type {given} is unknown; {near_matches(name, PEFT_TYPES)}")
    return name


def without_our_adapter(given: Sequence[str], peft_type: str | None) -> str:
    """The message for options of ours that nobody would read."""
    found = f"--peft_type is {peft_type}" if peft_type else "--peft_type is not given"
    return (
        f"{', '.join(given)}: no effect, because {found}; use --peft_type moe_lora, or leave "
        f"{'it' if len(given) == 1 else 'them'} out"
    )
