"""The class that models a config: the one with a language model's head where there is one."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from trl_moe_ext.experts.census import family

_GENERATES = re.compile(r"For(CausalLM|ConditionalGeneration|Seq2SeqLM)$|LMHeadModel$")
_MAPPINGS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
    "MODEL_FOR_BACKBONE_MAPPING",
)


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that models `config`.

    First a class that generates text, from the auto classes or from the family's own modules: not every family is in
    the auto classes. Else the largest class of the family with this config class.

    Raises:
        LookupError: no class takes this config.
    """
    classes = model_classes(type(config))
    if not classes:
        raise LookupError(f"no class of transformers models a {type(config).__name__}")
    generating = [cls for cls in classes if _GENERATES.search(cls.__name__) and _has_forward(cls)]
    if generating:
        return generating[0]
    working = [cls for cls in classes if _has_forward(cls)] or classes
    return working[0] if len(working) == 1 else max(working, key=lambda cls: _size(cls, config))


def model_classes(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Every class that models a config of `config_class`: those of the auto classes, then those of the family."""
    found: list[type[PreTrainedModel]] = []
    for name in _MAPPINGS:
        entry = getattr(modeling_auto, name).get(config_class, ())
        found.extend(entry if isinstance(entry, tuple) else (entry,))
    for module in family.modeling_modules(config_class):
        found.extend(
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
        )
    return [cls for cls in dict.fromkeys(found) if _models(cls, config_class)]


def _models(cls: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> bool:
    # The auto classes give a composite config the class of the text model inside it.
    return cls.config_class is config_class and not cls.__name__.endswith("PreTrainedModel")


def _has_forward(cls: type[PreTrainedModel]) -> bool:
    return cls.forward is not nn.Module.forward


def _size(cls: type[PreTrainedModel], config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in cls(config).parameters())
