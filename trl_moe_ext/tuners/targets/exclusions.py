"""What `exclude_modules`, `layers_to_transform`, `layers_pattern` and `modules_to_save` leave of a model."""

from __future__ import annotations

import copy
import re

from peft.tuners.tuners_utils import check_target_module_exists

from trl_moe_ext.experts.anatomy import is_down_projection
from trl_moe_ext.experts.layout import ExpertsLayout, Projection
from trl_moe_ext.tuners.targets.options import TargetOptions
from trl_moe_ext.tuners.targets.words import EXPERT_WORDS


def keeps(config: TargetOptions, name: str) -> bool:
    """Whether a module may be adapted."""
    probe = copy.copy(config)
    # PEFT applies the layer options only to names matched by their suffix.
    probe.target_modules = {name.rpartition(".")[2]}
    return bool(check_target_module_exists(probe, name))


def keeps_experts(config: TargetOptions, name: str) -> bool:
    """The same for what holds the experts of a layer, whatever it is called."""
    return "experts" not in _excluded_words(config) and keeps(config, name)


def keeps_projection(config: TargetOptions, name: str, layout: ExpertsLayout, projection: Projection) -> bool:
    """Whether one projection of a module of stacked experts may be adapted."""
    if isinstance(config.exclude_modules, str):
        return re.fullmatch(config.exclude_modules, f"{name}.{projection.name}") is None
    for word in _excluded_words(config):
        path, _, last = word.rpartition(".")
        is_meant = last == projection.name or word_of(name, layout, projection) in EXPERT_WORDS.get(last, ())
        if last != "experts" and is_meant and ends_with(name, path):
            return False
    return True


def word_of(name: str, layout: ExpertsLayout, projection: Projection) -> str:
    """``gate_up`` or ``down``; where a module is a single projection, its name tells."""
    if layout.takes_rows:
        return "down" if is_down_projection(name) else "gate_up"
    return projection.word


def ends_with(name: str, path: str) -> bool:
    """Whether a module's name ends with these parts; every name does with none."""
    return not path or f".{name}".endswith(f".{path}")


def _excluded_words(config: TargetOptions) -> list[str]:
    return [] if isinstance(config.exclude_modules, str) else list(config.exclude_modules or ())
