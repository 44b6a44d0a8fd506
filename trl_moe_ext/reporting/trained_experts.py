"""Which of the routed experts are trained, and with which ranks, in words: counted on the model itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.tuners.adapted_experts import AdaptedExperts
from trl_moe_ext.tuners.moe_esft.layer import MoeEsftExperts
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts
from trl_moe_ext.tuners.selection.resolve import expert_of
from trl_moe_ext.tuners.targets.resolve import base_modules

__all__ = ["trained_experts"]

# Module of experts -> how many it has, and the trained ones with their ranks; a rank is None where there is none.
_Counts = dict[str, tuple[int, set[tuple[int, int | None]]]]


def trained_experts(model: nn.Module) -> str:
    """Such as ``12 of 48 in each layer (25%), ranks 4 to 32``; empty if all are trained alike, or none.

    Args:
        model: with its adapters, of which the active ones count.
    """
    counts = _counts(model)
    numbers = {name: len({expert for expert, _ in trained}) for name, (_, trained) in counts.items()}
    sizes = {name: size for name, (size, _) in counts.items()}
    ranks = {rank for _, trained in counts.values() for _, rank in trained if rank is not None}
    words = [] if numbers == sizes else [_of_layers(list(numbers.values()), list(sizes.values()))]
    if len(ranks) > 1:
        words.append(f"ranks {min(ranks)} to {max(ranks)}")
    return ", ".join(words)


def _of_layers(trained: list[int], sizes: list[int]) -> str:
    share = f"({sum(trained) / sum(sizes):.0%})"
    if len({*sizes}) > 1:
        return f"{sum(trained):,} of {sum(sizes):,} {share}"
    number = f"{trained[0]}" if len({*trained}) == 1 else f"{min(trained)} to {max(trained)}"
    return f"{number} of {sizes[0]} in each layer {share}"


def _counts(model: nn.Module) -> _Counts:
    modules = dict(base_modules(model))
    linears = read_anatomy(modules.items()).expert_linears
    counts: _Counts = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not any(p.requires_grad for p in layer.parameters()):
            continue
        if isinstance(layer, AdaptedExperts):
            counts[name] = (layer.layout.num_experts, {*_of_stack(layer)})
        elif isinstance(modules.get(linears.get(name, "")), nn.ModuleList | nn.ModuleDict):
            container = linears[name]
            _, trained = counts.setdefault(container, (len(list(modules[container].children())), set()))
            trained |= {(expert_of(modules, container, name), rank) for rank in _ranks(layer)}
    return counts


def _of_stack(layer: AdaptedExperts) -> Iterator[tuple[int, int | None]]:
    for adapter in filter(layer.holds, layer.active_adapters):
        if isinstance(layer, MoeLoraExperts):
            for each in layer.rank_classes[adapter]:
                yield from ((expert, each.rank) for expert in each.experts(layer.layout.num_experts))
        elif isinstance(layer, MoeEsftExperts):
            yield from ((expert, None) for expert in layer.selections[adapter].experts)


def _ranks(layer: BaseTunerLayer) -> set[int | None]:
    """Of the active adapters on a Linear; None where weights are trained themselves."""
    ranks: Mapping[str, int] = layer.r if isinstance(layer, LoraLayer) else {}
    return {ranks.get(adapter) for adapter in layer.active_adapters}
