"""The low-rank update of one projection for a run of experts, forward and backward, as batched products.

Legend: E experts, r rank; a run has G experts and R = G*m rows, those in excess among them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_moe_ext.kernels.dropout import drop
from trl_moe_ext.kernels.lora_linear import LowRank
from trl_moe_ext.kernels.expert_groups import ExpertGroup


class Update:
    """``s B A`` of one projection.

    Attributes:
        d_A, d_B: ``(E, r, in)`` and ``(E, out, r)``, the gradients of the factors in their dtype, complete when
            `backward` has run for every run of experts.
    """

    def __init__(self, factors: LowRank) -> None:
        self._factors = factors
        self._wide = torch.promote_types(factors.A.dtype, torch.float32)
        self.d_A, self.d_B = torch.zeros_like(factors.A), torch.zeros_like(factors.B)

    def project(self, x: Tensor, group: ExpertGroup) -> Tensor:
        """``s A (m.x)``: ``(R, in)`` to ``(R, r)``."""
        x = group.by_expert(self._masked(x, group).to(self._wide))
        return torch.bmm(x, self._of(self._factors.A, group).mT).mul_(self._factors.scaling).flatten(0, 1)

    def expand(self, y: Tensor, u: Tensor, group: ExpertGroup) -> None:
        """Add ``B u`` to y: ``(R, out)`` and ``(R, r)``."""
        _add_products(group.by_expert(y), group.by_expert(u.to(self._wide)), self._of(self._factors.B, group).mT)

    def backward(
        self, d_x: Tensor | None, grad: Tensor, x: Tensor, u: Tensor, group: ExpertGroup, weight: Tensor | None
    ) -> None:
        """Add to the gradient of x, and write those of the factors.

        Args:
            d_x: ``(R, in)``; None if it is not needed.
            grad: ``(R, out)``, the gradient of the projection's output; before its weight if there is one.
            x: ``(R, in)``, what the projection was applied to.
            u: ``(R, r)``, what `project` made of it.
            run: the experts and their rows.
            weight: ``(R, 1)``, left out of grad; the gradients of the factors have it, that of x has not.
        """
        grad, u = group.by_expert(grad.to(self._wide)), group.by_expert(u.to(self._wide))
        v = torch.bmm(grad, self._of(self._factors.B, group)).mul_(self._factors.scaling)
        if d_x is not None:
            A = self._of(self._factors.A, group)
            if self._factors.seed is None:
                _add_products(group.by_expert(d_x), v, A)
            else:
                d_x += self._masked(torch.bmm(v, A).flatten(0, 1), group)
        if weight is not None:
            w = group.by_expert(weight.to(self._wide))
            u, v = u * w, v * w
        x = group.by_expert(self._masked(x, group).to(self._wide))
        self.d_A[group.index] = torch.bmm(v.mT, x).to(self.d_A.dtype)
        self.d_B[group.index] = torch.bmm(grad.mT, u).to(self.d_B.dtype)

    def _of(self, factor: Tensor, group: ExpertGroup) -> Tensor:
        return factor.index_select(0, group.index).to(self._wide)

    def _masked(self, x: Tensor, group: ExpertGroup) -> Tensor:
        """What dropout leaves of the rows."""
        seed = self._factors.seed
        return x if seed is None else drop(x, seed, group.pairs, self._factors.dropout)


def _add_products(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right`` for every expert."""
    if out.dtype == left.dtype:
        torch.baddbmm(out, left, right, out=out)
    else:
        out += torch.bmm(left, right).to(out.dtype)  # an addition in one dtype is faster
