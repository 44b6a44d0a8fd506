"""What is logged of the policy that is trained, beside the one that generated: sums over all processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from trl_moe_ext.grpo.loss.importance_statistics import ImportanceStatistics
from trl_moe_ext.router.statistics import as_sum

__all__ = ["PolicyMeter"]

_STATISTICS = [field.name for field in fields(ImportanceStatistics)]


class PolicyMeter:
    """Adds micro-batches up until they are taken.

    Args:
        gather: makes ``(processes, N)`` of a ``(1, N)`` of each process.
    """

    def __init__(self, gather: Callable[[Tensor], Tensor]) -> None:
        self._gather = gather
        self._sums: Tensor | None = None
        self._statistics: ImportanceStatistics | None = None

    @torch.no_grad()
    def add(self, log_probs: Tensor, old_log_probs: Tensor, entropy: Tensor, statistics: ImportanceStatistics) -> None:
        """Add the tokens of a micro-batch, each ``(M,)``; every process has to call this."""
        logs = as_sum(log_probs - old_log_probs)
        # As TRL logs them: the ratio of each token, and k3 of the tokens as the generator drew them.
        own = torch.stack([logs.exp().sum(), (logs.expm1() - logs).sum(), as_sum(entropy).sum()])
        theirs = torch.stack([getattr(statistics, name) for name in _STATISTICS])
        everywhere = self._gather(torch.cat([own, theirs]).unsqueeze(0))
        sums, largest = everywhere.sum(0), everywhere.max(0).values
        values = {name: sums[len(own) + at] for at, name in enumerate(_STATISTICS)}
        values["max_ratio"] = largest[len(own) + _STATISTICS.index("max_ratio")]
        found = ImportanceStatistics(**values)
        self._sums = sums[: len(own)] if self._sums is None else self._sums + sums[: len(own)]
        self._statistics = found if self._statistics is None else self._statistics + found

    def take(self) -> dict[str, float]:
        """Name -> value since the last call; waits for the device. Empty if nothing was added."""
        sums, statistics = self._sums, self._statistics
        self._sums = self._statistics = None
        if sums is None or statistics is None:
            return {}
        metrics = statistics.metrics()
        if not metrics:
            return {}
        ratio, kl, entropy = (sums / statistics.tokens).tolist()
        own = {"ratio": ratio, "kl": kl, "entropy": entropy}
        return own | {f"importance/{name}": value for name, value in metrics.items()}
