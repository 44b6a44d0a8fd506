"""The options `--router_*` of `trl sft`: TRL's `SFTConfig` with our fields, as long as they are asked for."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.hosts.trl_arguments import MOE_TYPES, without_our_adapter

__all__ = ["SftOptions"]


class SftOptions:
    """What our `SFTConfig` adds to a parser, and the way back to TRL's.

    Args:
        types: the dataclasses of the parser.

    Attributes:
        ours: the same with `MoeSFTConfig` in the place of `SFTConfig`.
        names: of the options that it adds; none if there is no `SFTConfig`.
    """

    def __init__(self, types: list[Any]) -> None:
        self._stock = next((kind for kind in types if _is_sft_config(kind)), None)
        self._ours: Any = None
        self.names: tuple[str, ...] = ()
        if self._stock is not None:
            from trl_moe_ext.sft.config import ROUTER_OPTIONS, MoeSFTConfig

            self._ours, self.names = MoeSFTConfig, ROUTER_OPTIONS
        self.ours = [self._ours if kind is self._stock and kind is not None else kind for kind in types]

    def settle(self, namespace: argparse.Namespace, types: list[Any]) -> list[Any]:
        """The dataclasses for what was parsed: TRL's own `SFTConfig` unless an adapter of ours was asked for.

        Args:
            namespace: what was parsed; options that TRL's own has not are taken out for it.
            types: the dataclasses of the parser.

        Raises:
            ConfigError: one of our options was given without an adapter of ours.
        """
        if self._ours is None:
            return types
        peft_type = getattr(namespace, "peft_type", None)
        if str(peft_type).lower() in MOE_TYPES:
            return [self._ours if kind is self._stock else kind for kind in types]
        defaults = {option.name: option.default for option in fields(self._ours)}
        given = [f"--{name}" for name in self.names if getattr(namespace, name, defaults[name]) != defaults[name]]
        if given:
            raise ConfigError(without_our_adapter(given, peft_type))
        for name in self.names:
            namespace.__dict__.pop(name, None)
        return [self._stock if kind is self._ours else kind for kind in types]


def _is_sft_config(kind: Any) -> bool:
    """By name: its module is large, and other commands do not load it."""
    return getattr(kind, "__name__", "") == "SFTConfig" and kind.__module__.startswith("trl.")
