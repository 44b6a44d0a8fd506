"""The `TrlParser` that knows `--peft_type`, `--moe_*` and `--router_*`, and complains about them in one line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from trl.scripts.utils import TrlParser
from trl.trainer.model_config import ModelConfig

from trl_moe_ext.errors import MoeExtError, near_matches
from trl_moe_ext.hosts import trl as host
from trl_moe_ext.hosts import trl_grpo_options as grpo_options
from trl_moe_ext.hosts import trl_sft_options as sft_options
from trl_moe_ext.hosts.trl_arguments import CONFIG_FIELDS, MoeModelConfig
from trl_moe_ext.hosts.trl_errors import tell_in_one_line
from trl_moe_ext.hosts.trl_peft_config import adapter_config

__all__ = ["MoeTrlParser"]

_OPTIONS = ("peft_type", *CONFIG_FIELDS)
# How argparse begins what it says about one of our options.
_ABOUT_US = re.compile(r"(argument|ambiguous option:) --(peft|moe|router)[_-]")
_OUR_PREFIXES = ("peft_", "moe_", "router_")


class MoeTrlParser(TrlParser):  # type: ignore[misc]
    """`TrlParser(...)` returns one whenever `ModelConfig` is among its dataclasses, see `hosts.trl.install_parser`.

    Arguments without `peft_type`, or with ``lora``, come back as a plain `ModelConfig` and `SFTConfig`: TRL goes on as
    if we were not installed. A mistake in our options ends the process as argparse does, but without the text of all
    the options.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        types = list(dataclass_types) if isinstance(dataclass_types, Iterable) else [dataclass_types]
        self._sft = sft_options.SftOptions(types)
        self.dataclass_types: list[Any]
        super().__init__([MoeModelConfig if kind is ModelConfig else kind for kind in self._sft.ours], **kwargs)

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            outputs = tuple(map(_settle, super().parse_args_into_dataclasses(*args, **kwargs)))
            if any(isinstance(output, MoeModelConfig) for output in outputs):
                host.add_run_summary()
                host.use_moe_sft_trainer()
                tell_in_one_line()
                grpo_options.bound_cache(host.training_script())
        except MoeExtError as error:
            self._refuse(str(error))
        return outputs

    def parse_dict(self, args: dict[str, Any], *others: Any, **kwargs: Any) -> tuple[Any, ...]:
        self.dataclass_types = self._sft.settle(argparse.Namespace(**args), self.dataclass_types)
        return tuple(map(_settle, super().parse_dict(args, *others, **kwargs)))

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, extras = super().parse_known_args(*args, **kwargs)
        self._refuse_unknown(extras)
        # From here on the dataclasses are made of what stands in the namespace.
        try:
            self.dataclass_types = self._sft.settle(namespace, self.dataclass_types)
        except MoeExtError as error:
            self._refuse(str(error))
        return namespace, extras

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        remaining: list[str] = super().set_defaults_with_config(**kwargs)
        self._refuse_unknown(remaining)
        return remaining

    def error(self, message: str) -> None:
        if _ABOUT_US.match(message):
            self._refuse(message)
        super().error(message)

    def _refuse_unknown(self, remaining: Sequence[str]) -> None:
        """TRL hands options that it does not know to accelerate, and the script leaves unknown YAML keys alone."""
        for option in remaining:
            name = option.partition("=")[0].removeprefix("--").replace("-", "_")
            if option.startswith("--") and name.startswith(_OUR_PREFIXES):
                self._refuse(f"--{name} is unknown; {near_matches(name, (*_OPTIONS, *self._sft.names))}")

    def _refuse(self, message: str) -> NoReturn:
        script = host.training_script()
        command = f"trl {script}" if script else self.prog
        self.exit(2, f"{command}: error: {message}\n")
        raise AssertionError("ArgumentParser.exit returned")


def _settle(parsed: Any) -> Any:
    """Turn arguments that are not for us back into TRL's own, and check the others as the trainer will."""
    if not isinstance(parsed, MoeModelConfig):
        return parsed
    if not parsed.is_ours:
        return parsed.as_stock()
    adapter_config(parsed)
    host.install_peft_config()  # done already, or TRL would train plain LoRA with these arguments
    return parsed
