"""The large products of the experts of a group: each one's rows times its frozen matrix, one after the other.

Legend: H hidden, I intermediate; a group has R rows, those of its experts and some in excess.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trl_moe_ext.kernels.expert_groups import ExpertGroup
from trl_moe_ext.kernels.fused_parts import Frozen


class _Product:
    """With one frozen stack. Its results are in memory that those of the next group are written over."""

    def __init__(self, stack: Tensor, rows: int, dtype: torch.dtype) -> None:
        self._weights: Sequence[Tensor] = stack.unbind(0)
        self._shape, self._dtype = (rows, stack.shape[2]), dtype
        self._results: Tensor | None = None

    def __call__(self, x: Tensor, group: ExpertGroup, out: Tensor | None = None) -> Tensor:
        """``(R, in)`` to ``(R, n)``, in `out` if given; zero in rows of excess beyond an expert's size."""
        if out is None:
            if self._results is None:
                self._results = torch.empty(self._shape, dtype=self._dtype)
            out = self._results[: len(x)]
        each = zip(group.experts, group.sizes, group.by_expert(x), group.by_expert(out), strict=True)
        for expert, size, rows, results in each:
            if size == len(results):
                torch.mm(rows, self._weights[expert], out=results)
            else:
                torch.mm(rows[:size], self._weights[expert], out=results[:size])
                results[size:].zero_()
        return out


class ExpertProducts:
    """The products of the two projections and of their gradients.

    Attributes:
        up: ``(R, H)`` to the first projection's output; `up_back` from the gradient of that to ``(R, H)``.
        down: ``(R, I)`` to ``(R, H)``; `down_back` from the gradient of that to ``(R, I)``.
    """

    def __init__(self, frozen: Frozen, groups: Sequence[ExpertGroup], dtype: torch.dtype) -> None:
        rows = max((len(group.pairs) for group in groups), default=0)
        self.up, self.up_back = _Product(frozen.up, rows, dtype), _Product(frozen.up.mT, rows, dtype)
        self.down, self.down_back = _Product(frozen.down, rows, dtype), _Product(frozen.down.mT, rows, dtype)
