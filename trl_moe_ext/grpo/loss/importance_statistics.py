"""What is known of the ratios of some tokens, as sums: they add up over micro-batches, steps and processes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from trl_moe_ext.router.statistics import as_sum

__all__ = ["ImportanceStatistics"]


@dataclass(frozen=True)
class ImportanceStatistics:
    """Sums over the tokens that are trained on, before any is masked by its ratio; each ``()``, float64.

    Attributes:
        tokens: how many there are.
        ratio: of the ratios that the weights are made of: of tokens or of sequences.
        limited: how many ratios were beyond the limits, and therefore truncated or masked.
        weight: of the weights.
        squared_weight: of their squares.
        kl_k1: of ``r log r``, with the ratio ``r`` of each token.
        kl_k3: of ``r log r - (r - 1)``.
        max_ratio: the largest ratio, no sum; 0 if there is no token.
    """

    tokens: Tensor
    ratio: Tensor
    limited: Tensor
    weight: Tensor
    squared_weight: Tensor
    kl_k1: Tensor
    kl_k3: Tensor
    max_ratio: Tensor

    @classmethod
    def of(
        cls, token_log_ratio: Tensor, ratio: Tensor, weights: Tensor, limited: Tensor, mask: Tensor
    ) -> ImportanceStatistics:
        """The statistics of some tokens, without waiting for the device.

        Args:
            token_log_ratio: any shape, without a graph.
            ratio: of the same shape, what the weights were made of.
            weights: of the same shape, 0 in masked positions.
            limited: of the same shape, bool, False in masked positions.
            mask: of the same shape, bool, the tokens that count.
        """
        logs, ratio = (as_sum(torch.where(mask, values, 0)) for values in (token_log_ratio, ratio))
        r = logs.exp()
        none = ratio.new_zeros(1)
        return cls(
            tokens=as_sum(mask.sum()),
            ratio=ratio.sum(),
            limited=as_sum(limited.sum()),
            weight=as_sum(weights).sum(),
            squared_weight=as_sum(weights).square().sum(),
            kl_k1=(r * logs).sum(),
            # Not as r * log(r) - (r - 1), of which nothing is left for ratios near 1.
            kl_k3=(r * (logs + torch.expm1(-logs))).sum(),
            max_ratio=torch.cat([ratio.flatten(), none]).max(),
        )

    def __add__(self, other: ImportanceStatistics) -> ImportanceStatistics:
        added = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return replace(self, **added | {"max_ratio": torch.maximum(self.max_ratio, other.max_ratio)})

    def metrics(self) -> dict[str, float]:
        """What is logged; waits for the device once. Empty if there is no token.

        Returns:
            ``ratio_mean``, ``ratio_max``, ``limited_share`` (of the tokens: truncated or masked), ``ess`` (effective
            sample size in tokens by Kish 1965: the square of the sum of the weights over the sum of their squares),
            ``ess_share`` (of the tokens), ``kl_k1`` and ``kl_k3`` (estimates of KL(trainer || generator): the mean
            over the tokens, in nats). These are Schulman's k1 and k3 (http://joschu.net/blog/kl-approx.html) for
            samples of the second policy, and so weighted with the ratio; k3 is never negative and varies less.
        """
        values = torch.stack([getattr(self, field.name) for field in fields(self)]).tolist()
        tokens, ratio, limited, weight, squared_weight, kl_k1, kl_k3, max_ratio = values
        if not tokens:
            return {}
        ess = weight**2 / squared_weight if squared_weight else 0.0
        return {
            "ratio_mean": ratio / tokens,
            "ratio_max": max_ratio,
            "limited_share": limited / tokens,
            "ess": ess,
            "ess_share": ess / tokens,
            "kl_k1": kl_k1 / tokens,
            "kl_k3": kl_k3 / tokens,
        }
