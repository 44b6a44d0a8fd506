"""What a profile says of one model: read, compared with the model, and joined where modules share their weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from torch import nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.profiles.choose import by_coverage, by_number
from trl_moe_ext.profiles.match import check_profile
from trl_moe_ext.profiles.profile import ExpertProfile, LayerUse
from trl_moe_ext.tuners.selection.options import ExpertSelectionOptions
from trl_moe_ext.tuners.targets.tied import TiedNames

Uses = Mapping[str, LayerUse]


def load_profile(path: Path) -> ExpertProfile:
    """Read the profile that a config names.

    Raises:
        ConfigError: there is no such file, or it is no profile.
    """
    try:
        return ExpertProfile.load(path)
    except ConfigError as error:
        if path.exists():
            raise
        raise ConfigError(
            f"{error}. An earlier run has what it chose in its adapter_config.json: to train the same experts without "
            "the profile give selected_experts from there in its place, in Python, and rank_pattern where ranks came "
            "from it"
        ) from error


def read_uses(config: ExpertSelectionOptions, model: nn.Module, tied: TiedNames) -> Uses | None:
    """How much the experts of each module were used, by the profile that decides; None if none does.

    Raises:
        ConfigError: the profile cannot be read, or is of another model.
    """
    if config.profile_path is None or not config.is_decided_by_profile:
        return None
    profile = load_profile(config.profile_path)
    check_profile(profile, model)
    return uses_of_modules(profile, tied)


def refuse_nested(config: ExpertSelectionOptions, model: nn.Module) -> None:
    """Raise ConfigError for a choice of experts on a PeftModel: their names are those in the model below it."""
    if config.selects_experts and isinstance(model, PeftModel):
        raise ConfigError(
            "the model is a PeftModel already, in which the experts have other names than in the model that was "
            "profiled; use model.add_adapter(NAME, config) for a second adapter, or model.unload() before"
        )


def uses_of_modules(profile: ExpertProfile, tied: TiedNames) -> dict[str, LayerUse]:
    """Of each module of experts its use; modules that share their weights have one, which is that of all of them."""
    layers: defaultdict[str, list[LayerUse]] = defaultdict(list)
    for layer in profile.layers:
        for name in tied.of(layer.experts):
            layers[name].append(layer)
    return {name: _joined(of_it) for name, of_it in layers.items()}


def chosen_experts(config: ExpertSelectionOptions, use: LayerUse) -> tuple[int, ...]:
    """The experts of one module that `config`, which says how many, takes by their use, in ascending order."""
    shares = use.shares(config.expert_score)
    if config.experts_per_layer is not None:
        return by_number(shares, config.experts_per_layer)
    assert config.expert_coverage is not None
    return by_coverage(shares, config.expert_coverage)


def _joined(layers: Sequence[LayerUse]) -> LayerUse:
    """The use by several routers as if it were one: shares weighted by choices, scores by tokens."""
    first, *others = layers
    if not others:
        return first
    choices = [layer.tokens * layer.top_k for layer in layers]
    return replace(
        first,
        label="+".join(layer.label for layer in layers),
        tokens=sum(layer.tokens for layer in layers),
        token_share=_mean([layer.token_share for layer in layers], choices),
        gate_score=_mean([layer.gate_score for layer in layers], [layer.tokens for layer in layers]),
    )


def _mean(rows: Sequence[Sequence[float]], weights: Sequence[int]) -> tuple[float, ...]:
    """``(E,)``: the mean of rows of E numbers, with a weight each; the plain mean where no token was counted."""
    weights = weights if sum(weights) else [1] * len(rows)
    columns = zip(*rows, strict=True)
    return tuple(sum(w * value for w, value in zip(weights, each, strict=True)) / sum(weights) for each in columns)
