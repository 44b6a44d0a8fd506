"""Modules of stacked experts as a family of tomorrow might write them: no flags, no decorator."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPERTS, HIDDEN, INNER = 5, 16, 8


class StackedExperts(nn.Module):
    """A loop over the experts, one of whose stacks holds gate and up."""

    shapes: ClassVar = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}

    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        generator = torch.Generator().manual_seed(0)
        for name, shape in self.shapes.items():
            stack = torch.randn(EXPERTS, *shape, generator=generator) * shape[-1] ** -0.5
            self.register_parameter(name, nn.Parameter(stack))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            token, slot = torch.where(top_k_index == expert)
            y = self.one(expert, hidden_states[token])
            out = out.index_add(0, token, y * top_k_weights[token, slot, None])
        return out

    def one(self, expert: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert])


class Transposed(StackedExperts):
    shapes: ClassVar = {"gate_up_proj": (HIDDEN, 2 * INNER), "down_proj": (INNER, HIDDEN)}

    def one(self, expert: int, x: Tensor) -> Tensor:
        gate, up = (x @ self.gate_up_proj[expert]).chunk(2, dim=-1)
        return (self.act_fn(gate) * up) @ self.down_proj[expert]


class Apart(StackedExperts):
    shapes: ClassVar = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}

    def one(self, expert: int, x: Tensor) -> Tensor:
        return F.linear(self.act_fn(F.linear(x, self.w1[expert])) * F.linear(x, self.w3[expert]), self.w2[expert])


class ApartAndTransposed(StackedExperts):
    shapes: ClassVar = {"gate_proj": (HIDDEN, INNER), "up_proj": (HIDDEN, INNER), "down_proj": (INNER, HIDDEN)}

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = HIDDEN

    def one(self, expert: int, x: Tensor) -> Tensor:
        return (self.act_fn(x @ self.gate_proj[expert]) * (x @ self.up_proj[expert])) @ self.down_proj[expert]


class Ungated(StackedExperts):
    shapes: ClassVar = {"up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}

    def one(self, expert: int, x: Tensor) -> Tensor:
        return F.linear(self.act_fn(F.linear(x, self.up_proj[expert])), self.down_proj[expert])


class OwnGate(StackedExperts):
    def one(self, expert: int, x: Tensor) -> Tensor:
        return F.linear(self._apply_gate(F.linear(x, self.gate_up_proj[expert])), self.down_proj[expert])

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up[:, ::2], gate_up[:, 1::2]
        return torch.sigmoid(gate) * (up + 1)


class Biased(StackedExperts):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def one(self, expert: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[expert], self.gate_up_proj_bias[expert]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert], self.down_proj_bias[expert])


class UpBeforeGate(StackedExperts):
    """Looks like `StackedExperts` and is not."""

    def one(self, expert: int, x: Tensor) -> Tensor:
        up, gate = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert])


class WithScale(StackedExperts):
    """Has a weight whose use nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(EXPERTS))


class Clamped(StackedExperts):
    """Differs from `StackedExperts` on large tokens only."""

    def one(self, expert: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[expert]).clamp(-7, 7).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, self.down_proj[expert])


class WithDropout(StackedExperts):
    """Looks like `StackedExperts` when it is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)


class WithOption(StackedExperts):
    """Can be called with more than routing."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(hidden_states, top_k_index, top_k_weights) * scale


UNREADABLE = [WithScale, WithDropout, WithOption]
READABLE = [StackedExperts, Transposed, Apart, ApartAndTransposed, Ungated, OwnGate, Biased]
