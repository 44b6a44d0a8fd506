"""How a router's logits become scores, and the scores of the chosen experts routing weights.

In almost every family the weights are ``scale * s[chosen]``, divided by the sum of the chosen or not, with s the
softmax, the sigmoid or the square root of the softplus of the logits. Which of them a router uses is found from one of
its routings by comparison, not by name. No such rule exists, and `recognise_scoring` returns None, where

- the weights depend on more than the logits: the shared experts take part in the sum (Inkling), or each expert has a
  learned scale of its own (Gemma 4, once it is trained);
- all but the nearest logits are masked before the softmax (Phi-3.5-MoE);
- the weights never leave the module (Doge).

Legend: T tokens, K top_k, E experts of the router.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Scores", "Scoring", "as_probabilities", "recognise_scores", "recognise_scoring"]

# "probabilities": the family hands out probabilities instead of logits.
Scores = Literal["softmax", "sigmoid", "sqrt_softplus", "probabilities"]

# Tokens that are enough to tell the rules apart.
_TOKENS = 256
# Of float32 weights: some families add 1e-6 to the sum by which they divide.
_TOLERANCE = 4e-6
# Below lies the rounding of the comparison itself, in float64.
_EXACT = 1e-12


@dataclass(frozen=True)
class Scoring:
    """The rule from logits to routing weights.

    Attributes:
        scores: how logits become scores.
        normalised: the scores of the chosen experts are divided by their sum.
        scale: by which the weights are multiplied.
    """

    scores: Scores
    normalised: bool
    scale: float

    def probabilities(self, logits: Tensor) -> Tensor:
        """``(T, E)`` float32 that sum to one over the experts; see `as_probabilities`."""
        return as_probabilities(logits, self.scores)

    def weights(self, logits: Tensor, top_k_index: Tensor) -> Tensor:
        """The routing weights of any choice of experts, with gradients to the logits.

        Args:
            logits: ``(T, E)``.
            top_k_index: ``(T, K)`` int64, which need not be what the router would choose.

        Returns:
            ``(T, K)`` float32, or float64 if the logits are.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _chosen(logits, top_k_index, self.scores, self.normalised) * self.scale


def as_probabilities(logits: Tensor, scores: Scores) -> Tensor:
    """``(T, E)`` float32 that sum to one over the experts, with gradients to the logits.

    Scores that do not sum to one by themselves are divided by their sum, as in DeepSeek-V3 (arXiv 2412.19437, section
    2.1.2).
    """
    values = _score(logits.float(), scores)
    return values if scores in ("softmax", "probabilities") else _normalised(values)


def recognise_scoring(logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Scoring | None:
    """The rule that gives the weights of an observed routing, or None if none does up to the rounding of the dtype.

    Where a routing cannot tell two rules apart, as a single chosen expert whose weight is normalised to one cannot, it
    is the first of `Scores` that fits.

    Args:
        logits: ``(T, E)`` of any floating-point dtype.
        top_k_index: ``(T, K)`` int64.
        top_k_weights: ``(T, K)``. Tokens with a weight of zero, which an expert turned away, are not looked at.
    """
    tolerance = _tolerance(logits, top_k_weights)
    logits, index, weights = _sample(logits, top_k_index, top_k_weights)
    if not len(weights):
        return None
    best, least = None, tolerance
    for scores, normalised in _rules(logits):
        ratios = weights / _chosen(logits, index, scores, normalised)
        scale = _round(ratios)
        error = max(float((ratios / scale - 1).abs().max()), _EXACT) if scale > 0 else math.inf
        # Of two rules that fit, the second has to fit clearly better: the rest is rounding.
        if error <= least:
            best, least = Scoring(scores, normalised, scale), error / 4
    return best


def recognise_scores(logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor | None) -> Scores | None:
    """How logits become scores, also where the weights follow from them in a way that `Scoring` does not know.

    Arguments are as for `recognise_scoring`; the weights may be missing.
    """
    scoring = None if top_k_weights is None else recognise_scoring(logits, top_k_index, top_k_weights)
    if scoring is not None:
        return scoring.scores
    if _are_probabilities(logits[:_TOKENS].detach().double()):
        return "probabilities"
    if top_k_weights is None or top_k_weights.shape[1] == 1:
        return None
    # The weights of a token may have been multiplied by anything.
    shares = _normalised(top_k_weights.detach())
    scoring = recognise_scoring(logits, top_k_index, shares)
    return None if scoring is None else scoring.scores


def _rules(logits: Tensor) -> Iterator[tuple[Scores, bool]]:
    known: tuple[Scores, ...] = get_args(Scores)
    is_probabilities = _are_probabilities(logits)
    for scores in known:
        if (scores == "probabilities") == is_probabilities:
            yield scores, True
            yield scores, False


def _score(logits: Tensor, scores: Scores) -> Tensor:
    match scores:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case "sqrt_softplus":
            return F.softplus(logits).sqrt()
        case "probabilities":
            return logits


def _chosen(logits: Tensor, top_k_index: Tensor, scores: Scores, normalised: bool) -> Tensor:
    values = _score(logits, scores).gather(1, top_k_index)
    return _normalised(values) if normalised else values


def _normalised(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def _are_probabilities(logits: Tensor) -> bool:
    sums = logits.sum(-1)
    return len(logits) > 0 and bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())


@torch.no_grad()
def _sample(logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = (top_k_weights != 0).all(-1).nonzero().flatten()[:_TOKENS]
    return logits[rows].double(), top_k_index[rows], top_k_weights[rows].double()


def _tolerance(*tensors: Tensor) -> float:
    """Relative. In half precision a score, its sum, the quotient and the scaled quotient are rounded."""
    return max(_TOLERANCE, *(2 * torch.finfo(tensor.dtype).eps for tensor in tensors))


def _round(ratios: Tensor) -> float:
    """The shortest decimal number that is the mean of `ratios`, as far as that is known.

    A config says 2.5, which the mean of a few thousand rounded quotients is not exactly.
    """
    mean = float(ratios.mean())
    spread = float(ratios.std(correction=0)) / ratios.numel() ** 0.5
    slack = max(4 * spread, abs(mean) * _TOLERANCE / 2)
    if not math.isfinite(mean):
        return math.nan
    candidates = (float(f"{mean:.{digits}g}") for digits in range(1, 8))
    return next((candidate for candidate in candidates if abs(candidate - mean) <= slack), mean)
