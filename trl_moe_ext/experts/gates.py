"""Which activation with a closed form a module of experts has: found by comparison, not by name."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.kernels.gates import GATES, Gate

_ROWS, _FEATURES = 16, 32
# Beyond the bounds of every clamp in the field, so that one is never taken for its unclamped relative.
_SPREAD = 40.0


@torch.no_grad()
def recognise_gate(module: nn.Module, layout: ExpertsLayout) -> Gate | None:
    """The activation between the projections of `module`, or None if it is none of `GATES`."""
    if layout.activation is None:
        return None
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(_ROWS, _FEATURES, generator=generator, dtype=torch.float64, device="cpu")
    h = torch.cat([h, h * _SPREAD])
    try:
        expected = layout.activation(module, h)
    except RuntimeError:
        return None  # it holds tensors of another device or dtype
    for gate in _candidates(module, layout):
        found = gate.forward(h)
        if found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
            return gate
    return None


def _candidates(module: nn.Module, layout: ExpertsLayout) -> Iterator[Gate]:
    for name in GATES:
        if name == "clamped":
            alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
            if isinstance(alpha, float) and isinstance(limit, (int, float)):
                yield Gate(name, alpha, float(limit))
        elif name.endswith("_glu") == layout.has_gate:
            yield Gate(name)
