"""A family of models in transformers: its config classes, the modules that model it, their source text."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from transformers import CONFIG_MAPPING, PreTrainedConfig

from trl_moe_ext.errors import ConfigError, near_matches


def config_class(model_type: str) -> type[PreTrainedConfig]:
    """The config class of `model_type`, also of a type that only occurs inside another config.

    Raises:
        ConfigError: transformers knows no such type.
    """
    if model_type in CONFIG_MAPPING:
        found: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
        return found
    nested = nested_config_classes()
    if model_type not in nested:
        raise ConfigError(
            f"model type {model_type!r} is not one of transformers; {near_matches(model_type, CONFIG_MAPPING)}"
        )
    return nested[model_type]


def nested_config_classes() -> dict[str, type[PreTrainedConfig]]:
    """Type and class of the configs that occur inside others and are not registered on their own."""
    return _nested_config_classes(tuple(CONFIG_MAPPING))


@functools.cache
def _nested_config_classes(registered: tuple[str, ...]) -> dict[str, type[PreTrainedConfig]]:
    found: dict[str, type[PreTrainedConfig]] = {}
    for model_type in registered:
        for sub_class in sub_config_classes(CONFIG_MAPPING[model_type]):
            if sub_class.model_type and sub_class.model_type not in registered:
                found.setdefault(sub_class.model_type, sub_class)
    return found


def sub_config_classes(cls: type[PreTrainedConfig]) -> Iterator[type[PreTrainedConfig]]:
    """The classes of the configs inside a default config of class `cls`, at any depth."""
    for spec in cls.sub_configs_defaults.values():
        # A slot that takes any type names the type of its default.
        sub_class = spec.config_class
        if not issubclass(sub_class, PreTrainedConfig):
            if spec.model_type not in CONFIG_MAPPING:
                continue
            sub_class = CONFIG_MAPPING[spec.model_type]
        yield sub_class
        yield from sub_config_classes(sub_class)


def modeling_files(cls: type[PreTrainedConfig]) -> list[Path]:
    """The files beside the config class that hold its models; the config's own file where there are none."""
    own = Path(str(sys.modules[cls.__module__].__file__))
    return sorted(own.parent.glob("modeling_*.py")) if own.name.startswith("configuration_") else [own]


def modeling_modules(cls: type[PreTrainedConfig]) -> list[ModuleType]:
    """The imported modules of `modeling_files`.

    Raises:
        ImportError: a module of the family needs a library that is not installed.
    """
    package = cls.__module__.rpartition(".")[0]
    if not Path(str(sys.modules[cls.__module__].__file__)).name.startswith("configuration_"):
        return [sys.modules[cls.__module__]]
    return [importlib.import_module(f"{package}.{path.stem}") for path in modeling_files(cls)]


def source(cls: type[PreTrainedConfig]) -> str:
    """The text of the files of the family: its configs and its models."""
    own = Path(str(sys.modules[cls.__module__].__file__))
    return "\n".join(_text(path) for path in sorted({own, *modeling_files(cls)}))


@functools.cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
