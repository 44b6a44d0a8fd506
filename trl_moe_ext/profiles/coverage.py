"""How few experts get how much: coverage curves, and what they say.

Legend: E experts of a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from trl_moe_ext.profiles.choose import by_coverage
from trl_moe_ext.profiles.profile import ExpertProfile, LayerUse

__all__ = ["LayerCoverage", "coverage_curve", "coverage_of", "judgement", "mean_curve", "quarter"]

# How many times their equal part the most used quarter of the experts gets. No paper draws these lines; the numbers
# behind the judgement are told with it.
_HOT, _EVEN = 2.0, 1.4
# Choices that fell on an expert on average, below which nothing is judged. With equal use the most used quarter then
# gets some 1.2 times its part by chance alone: 1.27 standard deviations, of a relative 1 / sqrt(40).
_ENOUGH_CHOICES = 40


@dataclass(frozen=True)
class LayerCoverage:
    """How few experts of one layer get how much.

    Attributes:
        label: of the layer.
        num_experts: E.
        most_used: the expert with the largest share.
        largest_share: its share.
        experts_for_50, experts_for_80, experts_for_90: the fewest experts that get so many per cent.
        unused: experts that got nothing.
        quarter_share: what the most used quarter of the experts gets.
    """

    label: str
    num_experts: int
    most_used: int
    largest_share: float
    experts_for_50: int
    experts_for_80: int
    experts_for_90: int
    unused: int
    quarter_share: float


def coverage_curve(shares: Sequence[float]) -> tuple[float, ...]:
    """``(E + 1,)``: what the n most used experts get together, for n from 0 to E."""
    return (0.0, *itertools.accumulate(sorted(shares, reverse=True)))


def mean_curve(curves: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean of the curves of all layers; those of layers with fewer experts are stretched to the longest."""
    longest = max(len(curve) for curve in curves) - 1
    return tuple(fmean(_at(curve, number / longest) for curve in curves) for number in range(longest + 1))


def coverage_of(layer: LayerUse, score: str = "token_share") -> LayerCoverage:
    """The numbers of one layer.

    Args:
        layer: of a profile.
        score: what use is measured by.
    """
    shares = layer.shares(score)
    needed = {part: len(by_coverage(shares, part / 100)) for part in (50, 80, 90)}
    return LayerCoverage(
        label=layer.label,
        num_experts=len(shares),
        most_used=max(range(len(shares)), key=shares.__getitem__),
        largest_share=max(shares),
        experts_for_50=needed[50],
        experts_for_80=needed[80],
        experts_for_90=needed[90],
        unused=sum(share == 0 for share in getattr(layer, score)),
        quarter_share=coverage_curve(shares)[quarter(len(shares))],
    )


def quarter(num_experts: int) -> int:
    """A quarter of the experts, at least one: what MoE-Sieve (arXiv 2603.24044) trains of each layer."""
    return max(1, round(num_experts / 4))


def judgement(profile: ExpertProfile, score: str = "token_share") -> str:
    """Whether few experts get most of the data, in words."""
    found = [coverage_of(layer, score) for layer in profile.layers]
    gets = fmean(layer.quarter_share for layer in found)
    equal = fmean(quarter(layer.num_experts) / layer.num_experts for layer in found)
    what = "the choices of experts" if score == "token_share" else "the weight of experts"
    numbers = (
        f"The most used quarter of the experts gets {gets:.0%} of {what}; with equal use it would be {equal:.0%}."
    )
    if all(layer.num_experts == 1 for layer in found):
        return "Every layer has one expert: there is nothing to choose."
    choices = min(layer.tokens * layer.top_k / layer.num_experts for layer in profile.layers)
    if choices < _ENOUGH_CHOICES:
        return (
            f"{numbers} That is of {choices:.1f} choices for each expert, too few to tell whether there is a hot set: "
            "profile more tokens."
        )
    if gets >= min(_HOT * equal, (1 + equal) / 2):
        return f"{numbers} There is a hot set: training only those experts leaves little of the data out."
    if gets >= min(_EVEN * equal, (1 + equal) / 2):
        return (
            f"{numbers} Use is uneven, but there is no clear hot set: compare with training all experts, or choose "
            "more than a quarter."
        )
    return (
        f"{numbers} There is no hot set: use is nearly equal, and the most used experts may do no better than random "
        "ones."
    )


def _at(curve: Sequence[float], part: float) -> float:
    """The height of a curve at a part of its length, on the line between its points."""
    place = part * (len(curve) - 1)
    below = min(int(place), len(curve) - 2)
    return curve[below] + (place - below) * (curve[below + 1] - curve[below])
