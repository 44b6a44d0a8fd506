"""Activations between the two projections whose derivatives have a closed form.

Legend: n rows, I intermediate; h is the output of the first projection, ``(n, 2I)`` with a gate, else ``(n, I)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Gate(NamedTuple):
    """An activation by name, with the numbers that it depends on.

    Attributes:
        name: a key of `GATES`.
        alpha, limit: of ``clamped``.
    """

    name: str
    alpha: float = 0.0
    limit: float = 0.0

    def forward(self, h: Tensor) -> Tensor:
        """``(n, I)`` from h."""
        return GATES[self.name].forward(h, self)

    def backward(self, h: Tensor, grad: Tensor) -> Tensor:
        """The gradient of h from that of the activation."""
        return GATES[self.name].backward(h, grad, self)


class _Form(NamedTuple):
    forward: Callable[[Tensor, Gate], Tensor]
    backward: Callable[[Tensor, Tensor, Gate], Tensor]


class _Elementwise(NamedTuple):
    """A function and its product with a gradient: ``(grad, x) -> grad * f'(x)``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


_ELEMENTWISE = {
    "silu": _Elementwise(F.silu, torch.ops.aten.silu_backward),
    "gelu": _Elementwise(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": _Elementwise(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "relu": _Elementwise(F.relu, lambda grad, x: grad * (x > 0)),
    "relu_squared": _Elementwise(lambda x: F.relu(x).square(), lambda grad, x: grad * F.relu(x) * 2),
}


def _halves(function: _Elementwise) -> _Form:
    """``f(gate) * up`` with the gate in front."""

    def forward(h: Tensor, _: Gate) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return function.forward(gate) * up

    def backward(h: Tensor, grad: Tensor, _: Gate) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        out = torch.empty_like(h)
        out_gate, out_up = out.chunk(2, dim=-1)
        out_up.copy_(function.forward(gate)).mul_(grad)  # `out=` into a view does not compile
        out_gate.copy_(function.backward(grad * up, gate))
        return out

    return _Form(forward, backward)


def _ungated(function: _Elementwise) -> _Form:
    return _Form(lambda h, _: function.forward(h), lambda h, grad, _: function.backward(grad, h))


def _clamped_forward(h: Tensor, gate: Gate) -> Tensor:
    raw_g, raw_up = _interleaved(h)
    g, up = raw_g.clamp(max=gate.limit), raw_up.clamp(-gate.limit, gate.limit)
    return (up + 1) * (g * torch.sigmoid(g * gate.alpha))


def _clamped_backward(h: Tensor, grad: Tensor, gate: Gate) -> Tensor:
    """Outside its bounds, which belong to the inside as in torch, a clamped value has no gradient.

    What is inside is one, else zero, in the dtype of h: booleans would take as long as all the rest.
    """
    raw_g, raw_up = _interleaved(h)
    g, up = raw_g.clamp(max=gate.limit), raw_up.clamp(-gate.limit, gate.limit)
    sigmoid = torch.sigmoid(g * gate.alpha)
    through = grad * sigmoid
    slope = (1 - sigmoid).mul_(g).mul_(gate.alpha).add_(1)
    out = torch.empty_like(h)
    out[..., ::2] = up.add_(1).mul_(through).mul_(slope).mul_(raw_g.le_(gate.limit))
    out[..., 1::2] = g.mul_(through).mul_(raw_up.abs_().le_(gate.limit))
    return out


def _interleaved(h: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, copied: arithmetic on every second number costs several times as much."""
    gate, up = (h[..., half::2].clone(memory_format=torch.contiguous_format) for half in (0, 1))
    return gate, up


GATES: dict[str, _Form] = {
    **{f"{name}_glu": _halves(function) for name, function in _ELEMENTWISE.items()},
    **{name: _ungated(function) for name, function in _ELEMENTWISE.items()},
    # gpt-oss: interleaved, clamped, (up + 1) * gate * sigmoid(alpha * gate).
    "clamped": _Form(_clamped_forward, _clamped_backward),
}
