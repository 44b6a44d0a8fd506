"""A config of a family at its default size, made tiny."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from trl_moe_ext.experts.census import family, rules
from trl_moe_ext.experts.census.layer_plan import LAYER_COUNT, LayerPlan, plan_layers
from trl_moe_ext.experts.census.overrides import OVERRIDES

_SMALLEST_MOVED_TOKEN = 16  # lower ids stay: every tiny vocabulary has them


class Shrinker:
    """Makes configs tiny. One instance for a config and all that it nests: they share the ids of special tokens."""

    def __init__(self) -> None:
        self._token_ids: dict[int, int] = {}

    def __call__(self, config: PreTrainedConfig, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
        """A tiny config of the class of `config`.

        Args:
            config: the config at full size; it stays as it is.
            overrides: attributes to set; for a nested config a mapping of its attributes, in which ``model_type`` puts
                another type in its place.
        """
        plan = plan_layers(config)
        wanted = {**OVERRIDES.get(config.model_type, {}), **(overrides or {})}
        arguments: dict[str, Any] = {}
        for name, default in _arguments(type(config)).items():
            value = vars(config).get(type(config).attribute_map.get(name, name))
            if isinstance(value, PreTrainedConfig):
                arguments[name] = self._nested(value, wanted.pop(name, {}))
            elif not _is_derived(default, value):
                arguments[name] = self._shrink(name, value, config, plan)
        if plan.overrides:
            arguments["per_layer_config"] = _layer_overrides(config, plan, arguments)
        _add_mrope_section(config, arguments)
        return type(config)(**{**arguments, **wanted})

    def _nested(self, config: PreTrainedConfig, wanted: Mapping[str, Any]) -> PreTrainedConfig:
        """The tiny config of the slot that holds `config`; of another type where `wanted` names one."""
        overrides = dict(wanted)
        model_type = overrides.pop("model_type", config.model_type)
        return self(config if model_type == config.model_type else family.config_class(model_type)(), overrides)

    def _shrink(self, name: str, value: Any, config: PreTrainedConfig, plan: LayerPlan) -> Any:
        if LAYER_COUNT.fullmatch(name) and isinstance(value, int):
            return min(value, plan.count)
        if plan.is_indices(value):
            return plan.positions(value)
        if plan.is_per_layer(value):
            value = plan.cut(value)
        if isinstance(value, list | tuple):
            return type(value)(self._scalar(name, entry, config) for entry in value)
        if isinstance(value, dict):
            return {key: self._scalar(name, entry, config) for key, entry in value.items()}
        if value is None:
            needed = rules.find(rules.NEEDED, name)
            return needed + needed[-1:] * (plan.count - len(needed)) if isinstance(needed, list) else needed
        return self._scalar(name, value, config)

    def _scalar(self, name: str, value: Any, config: PreTrainedConfig) -> Any:
        if isinstance(value, bool):
            switch = rules.find(rules.BOOLEANS, name)
            return value if switch is None else switch
        if isinstance(value, float):
            number = rules.find(rules.FLOATS, name)
            return value if number is None else number
        if not isinstance(value, int):
            return value
        if rules.TOKEN_ID.fullmatch(name):
            return self._token(value)
        if rules.KEY_VALUE_HEADS.fullmatch(name):
            return _key_value_heads(value, config)
        if name == "head_dim" and value == vars(config).get("qk_rope_head_dim"):
            name = "qk_rope_head_dim"  # in these families the rotary part of a head is called the head
        rule = rules.find(rules.INTEGERS, name)
        return value if rule is None else rule(value)

    def _token(self, token_id: int) -> int:
        if token_id < _SMALLEST_MOVED_TOKEN:
            return token_id
        return self._token_ids.setdefault(token_id, rules.VOCABULARY - 1 - len(self._token_ids))


def _key_value_heads(value: int, config: PreTrainedConfig) -> int:
    heads = [vars(config).get(name) for name in ("num_attention_heads", "n_heads", "num_heads")]
    return rules.HEADS if value in heads else min(value, 2)


def _layer_overrides(
    config: PreTrainedConfig, plan: LayerPlan, arguments: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """Attributes of single layers: half or double the tiny one where they are less or more than the config's."""
    tiny: dict[int, dict[str, Any]] = {}
    for position, overrides in plan.overrides.items():
        tiny[position] = {}
        for name, value in overrides.items():
            whole = vars(config).get(name)
            shrunk = arguments.get(name)
            if isinstance(value, int) and isinstance(whole, int) and isinstance(shrunk, int):
                value = shrunk * 2 if value > whole else max(shrunk // 2, 1)
            tiny[position][name] = value
    return tiny


def _arguments(cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Name and default of the arguments that are the family's own, not those of every config."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    found = {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    found |= {f.name: f.default for f in dataclasses.fields(cls)}
    common = {"self", *(f.name for f in dataclasses.fields(PreTrainedConfig))}
    return {name: default for name, default in found.items() if name not in common}


def _is_derived(default: Any, value: Any) -> bool:
    """Whether the config computed a number or a table from its other attributes: the tiny one will do so too."""
    return default is None and isinstance(value, int | float | dict) and not isinstance(value, bool)


def _add_mrope_section(config: PreTrainedConfig, arguments: dict[str, Any]) -> None:
    """Split the rotary dimensions into time, height and width as the tiny head has them.

    The models have a default for their full size in the code, which does not sum to the dimensions of a tiny head.
    """
    rope = arguments.get("rope_parameters") or vars(config).get("rope_parameters")
    if not isinstance(rope, dict) or "rope_type" not in rope or "mrope_section" not in family.source(type(config)):
        return
    half = int(rules.HEAD_DIM * rope.get("partial_rotary_factor", 1.0)) // 2
    third = max(half // 3, 1)
    arguments["rope_parameters"] = {**rope, "mrope_section": [third, third, half - 2 * third]}
