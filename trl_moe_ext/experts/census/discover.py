"""Which model types of the installed transformers have routed experts: found by building them, not from a list."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from transformers import CONFIG_MAPPING, PreTrainedConfig

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.experts.census import family
from trl_moe_ext.experts.census.model_class import model_classes
from trl_moe_ext.experts.census.overrides import OVERRIDES
from trl_moe_ext.experts.census.tiny import skeleton

_EXPERTS = re.compile(r"[Ee]xpert|Mo[Ee]")


@dataclass(frozen=True)
class Discovery:
    """What the installed transformers holds.

    Attributes:
        own: types whose own layers have routed experts.
        composite: types that nest one of `own`.
        failed: types that mention experts but of which no tiny model can be built, with the reason.
    """

    own: tuple[str, ...]
    composite: tuple[str, ...]
    failed: dict[str, str]


def moe_model_types() -> list[str]:
    """Every model type whose own layers have routed experts, sorted."""
    return list(discover().own)


def composite_types() -> list[str]:
    """Every model type that nests a config with routed experts, sorted."""
    return list(discover().composite)


def discover() -> Discovery:
    """Look through every model type that transformers knows, those registered by others too."""
    return _discover(tuple(CONFIG_MAPPING))


@functools.cache
def _discover(registered: tuple[str, ...]) -> Discovery:
    types = sorted({*registered, *family.nested_config_classes()})
    families = {model_type: family.config_class(model_type) for model_type in types}
    holds: set[str] = set()
    failed: dict[str, str] = {}
    mention = [model_type for model_type, cls in families.items() if _EXPERTS.search(family.source(cls))]
    _prove(mention, holds, failed)
    # A composite of another family need not have the word, but it has the type.
    nested = {model_type: _nested_types(model_type, cls) for model_type, cls in families.items()}
    nesting = [model_type for model_type in types if model_type not in mention and nested[model_type] & holds]
    _prove(nesting, holds, failed)
    composite = {model_type for model_type in holds if nested[model_type] & holds}
    return Discovery(tuple(sorted(holds - composite)), tuple(sorted(composite)), failed)


def _prove(candidates: list[str], holds: set[str], failed: dict[str, str]) -> None:
    """Add the candidates whose tiny model has experts to `holds`, those that cannot be built to `failed`."""
    for model_type in candidates:
        try:
            if not model_classes(family.config_class(model_type)):
                continue  # a config inside another, modelled by the classes of that one
            model = skeleton(model_type)
        except (MoeExtError, ImportError) as error:
            failed[model_type] = str(error)
            continue
        anatomy = read_anatomy(model.named_modules())
        if anatomy.experts or anatomy.expert_linears or anatomy.unread_experts:
            holds.add(model_type)


def _nested_types(model_type: str, cls: type[PreTrainedConfig]) -> set[str]:
    """Types of the configs inside the tiny config of `model_type`."""
    overrides = [each for each in OVERRIDES.get(model_type, {}).values() if isinstance(each, dict)]
    replaced = {str(each["model_type"]) for each in overrides if "model_type" in each}
    return {each.model_type for each in family.sub_config_classes(cls)} | replaced
