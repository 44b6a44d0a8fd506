"""Random tensors of a call of a kernel, the same from the same seed.

Legend: E experts, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_moe_ext.kernels.low_rank import LowRank


class Draw:
    """Draws on the CPU, whatever the device, so that numbers are the same on all of them."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype
        self._device = device
        self._seeds: dict[int, Tensor] = {}

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers around zero, `scale` their standard deviation."""
        return (torch.randn(*shape, generator=self._generator, device="cpu") * scale).to(self._device, self._dtype)

    def routing(self, tokens: int, num_experts: int, top_k: int) -> Tensor:
        """``(tokens, top_k)`` different experts of each token."""
        scores = torch.rand(tokens, num_experts, generator=self._generator, device="cpu")
        return scores.topk(top_k, dim=-1).indices.to(self._device)

    def stack(self, num_experts: int, n_in: int, n_out: int, is_transposed: bool) -> Tensor:
        """``(E, in, out)`` that keep the size of rows; a view unless they are stored in this way."""
        scale = n_in**-0.5
        if is_transposed:
            return self.normal(num_experts, n_in, n_out, scale=scale)
        return self.normal(num_experts, n_out, n_in, scale=scale).transpose(1, 2)

    def update(self, num_experts: int, r: int, n_in: int, n_out: int, number: int, dropout: float) -> LowRank:
        """The update of adapter `number`, with a scaling of its own."""
        A, B = self.normal(num_experts, r, n_in, scale=n_in**-0.5), self.normal(num_experts, n_out, r)
        return LowRank(A, B, 0.7 + number, dropout, self.seed(number) if dropout else None)

    def seed(self, number: int) -> Tensor:
        """The seed of an adapter's dropout: one tensor for all of its projections."""
        return self._seeds.setdefault(number, torch.tensor(1234 + number, dtype=torch.int32, device=self._device))
