"""The low-rank updates of one projection on all rows at once, forward and backward, as grouped products.

Updates of some experts only take the experts as runs (see `selected`). Several become one whose rank is the largest of
theirs, with zeros in what the others leave free: then they take as many passes over the rows as one.

Legend: S routed rows sorted by expert, R groups of rows (experts, or runs of them), r rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.grouped import aligned_rank, grouped_mm
from trl_moe_ext.kernels.low_rank import Updates
from trl_moe_ext.kernels.low_rank_rows import add_low_rank, outer, project


class GroupedUpdate:
    """Updates that `are_apart`; every method is a line of these formulas, on rows of one dtype.

    For rows x, the gradient g of the projection's output, scaling s and dropout m, as in `lora_linear`:
    ``u = s A (m.x)``, ``y += B u``, ``v = s B^T g``, ``dx += m.(A^T v)``, ``dA = v (m.x)^T``, ``dB = g u^T``.

    Rows of no expert may hold anything in what is returned. What is added to them is nothing, with `zero_tail` under
    dropout too, which costs two passes over all rows.
    """

    def __init__(self, updates: Updates, dispatch: Dispatch, like: Tensor, *, zero_tail: bool = False) -> None:
        self._updates, self._first, self._order, self._zero_tail = updates, updates[0], dispatch.order, zero_tail
        selections = [update.selected for update in updates if update.selected is not None]
        self._runs = [
            each.runs(like.device, [other for other in selections if other is not each]) for each in selections
        ]
        # The end of each group's rows, and which groups have an update. All updates have the same runs.
        self._groups: tuple[Tensor, Tensor | None] = dispatch.offsets, None
        if self._runs:
            self._groups = dispatch.offsets[self._runs[0].last], self._runs[0].is_alone
        # One scaling is for the rank-sized results, as in the formulas. Several are in A, and so in u and in dx.
        is_one = all(update.scaling == self._first.scaling for update in updates)
        self._scaling = self._first.scaling if is_one else 1.0
        self._scalings = [1.0 if is_one else update.scaling for update in updates]
        scaled = [u.A if is_one else u.A * scaling for u, scaling in zip(updates, self._scalings, strict=True)]
        # Zeros in place of the ranks that the device's products need in addition change no result.
        rank = aligned_rank(max(update.A.shape[1] for update in updates), like)
        self._A = self._joined(_padded(A.to(like.dtype), (0, 0, 0, rank - A.shape[1])) for A in scaled)
        self._B = self._joined(_padded(u.B.to(like.dtype), (0, rank - u.B.shape[2])) for u in updates)

    def u(self, x: Tensor) -> Tensor:
        return project(self._dropped(x), self._A.mT, *self._groups).mul_(self._scaling)

    def add_y(self, rows: Tensor, u: Tensor) -> None:
        add_low_rank(rows, u, self._B.mT, *self._groups)

    def v(self, g: Tensor) -> Tensor:
        return project(g, self._B, *self._groups).mul_(self._scaling)

    def add_dx(self, rows: Tensor, v: Tensor) -> None:
        if self._first.seed is None:
            add_low_rank(rows, v, self._A, *self._groups)
        else:
            rows += self._dropped(grouped_mm(v, self._A, self._groups[0], zero_tail=self._zero_tail))

    def dA(self, v: Tensor, x: Tensor) -> list[Tensor]:  # noqa: N802
        """One for each update."""
        parts = self._parts(outer(v, self._dropped(x), *self._groups))
        scaled = (p if s == 1.0 else p * s for p, s in zip(parts, self._scalings, strict=True))
        return [part[:, : u.A.shape[1]].to(u.A.dtype) for u, part in zip(self._updates, scaled, strict=True)]

    def dB(self, g: Tensor, u: Tensor) -> list[Tensor]:  # noqa: N802
        """One for each update."""
        parts = self._parts(outer(g, u, *self._groups))
        return [part[..., : u.B.shape[2]].to(u.B.dtype) for u, part in zip(self._updates, parts, strict=True)]

    def _joined(self, factors: Iterable[Tensor]) -> Tensor:
        """``(R, m, n)`` of those of each update."""
        first, *others = factors
        if not self._runs:
            return first
        joined = self._runs[0].spread(first)
        for runs, factor in zip(self._runs[1:], others, strict=True):
            runs.spread(factor, onto=joined)
        return joined

    def _parts(self, joined: Tensor) -> list[Tensor]:
        """``(R, m, n)`` to the ``(G, m, n)`` of each update."""
        return [runs.collect(joined) for runs in self._runs] or [joined]

    def _dropped(self, rows: Tensor) -> Tensor:
        return self._first.dropped(rows, self._order)


def _padded(factor: Tensor, zeros: tuple[int, ...]) -> Tensor:
    return F.pad(factor, zeros) if any(zeros) else factor
