"""What is done with routed rows between the grouped products: one Triton kernel each on a GPU, torch elsewhere.

On a GPU the products themselves are less than half of the time; the rest is reading and writing rows. Each function
here is one pass where torch takes three to eight. Under torch.compile torch is used, whose compiler fuses by itself.

Rows from ``offsets[-1]`` on belong to no expert and may hold anything, NaN included: they reach no result but rows of
no expert.

Legend: T tokens, K top_k, S = T*K routed rows sorted by expert, n columns, I intermediate.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from trl_moe_ext.kernels import on_triton
from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.gates import Gate

__all__ = ["combine", "gated", "gated_backward", "weight_gradient"]


def gated(gate: Gate, h: Tensor) -> Tensor:
    """The activation between the projections: ``(S, I)`` of ``(S, 2I)`` or ``(S, I)``."""
    triton_rows = _triton(h)
    return triton_rows.gated(gate, h) if triton_rows else gate.forward(h)


def gated_backward(
    gate: Gate, h: Tensor, d_a: Tensor, weights: Tensor | None, dispatch: Dispatch
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Back through the activation a, of which each row is weighted after it.

    Args:
        h: as `gated` had it.
        d_a: ``(S, I)``, the gradient of the weighted activation ``w a``; overwritten.
        weights: ``(S, 1)``, w; None for no weights.

    Returns:
        ``w d_a`` through the activation, as h; a itself, without its weight; and ``(S,)`` in float32 or wider the
        gradient of w, ``<d_a, a>``, zero for rows of no expert. None without weights.
    """
    triton_rows = _triton(h)
    if triton_rows:
        d_h, a, d_w = triton_rows.gated_backward(gate, h, d_a, weights)
    else:
        a, d_w = gate.forward(h), None
        if weights is not None:
            d_w = (a * d_a).sum(dim=-1, dtype=torch.promote_types(weights.dtype, torch.float32))
            d_a *= weights
        d_h = gate.backward(h, d_a)
    return d_h, a, None if d_w is None else d_w.masked_fill_(_is_nobodys(d_w, dispatch), 0)


def combine(rows: Tensor, weights: Tensor | None, dispatch: Dispatch) -> Tensor:
    """``(T, n)``: each token's sum of its K rows, weighted, in the dtype of the rows.

    Args:
        rows: ``(S, n)``; may be overwritten.
        weights: ``(T, K)`` routing weights in their own dtype; None for 1.
    """
    triton_rows = _triton(rows)
    if triton_rows:
        combined: Tensor = triton_rows.combine(rows, weights, dispatch)
        return combined
    rows = rows.masked_fill_(_is_nobodys(rows, dispatch).unsqueeze(1), 0)
    if weights is not None:
        rows *= dispatch.rows(weights)
    return dispatch.to_slots(rows).sum(dim=1)


def weight_gradient(rows: Tensor, grad: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """``(S,)`` in float32 or wider: the gradient of weights on the input, ``<rows, grad>``, zero for no expert's rows.

    Args:
        rows: ``(S, n)``, without their weights; overwritten.
        grad: ``(S, n)``, that of the weighted rows.
    """
    wide = torch.promote_types(weights.dtype, torch.float32)
    return rows.mul_(grad).sum(dim=-1, dtype=wide).masked_fill_(_is_nobodys(rows, dispatch), 0)


def _is_nobodys(rows: Tensor, dispatch: Dispatch) -> Tensor:
    """``(S,)`` bool, found without reading `offsets` on the host."""
    return torch.arange(rows.shape[0], device=rows.device) >= dispatch.offsets[-1]


def _triton(rows: Tensor) -> ModuleType | None:
    """The module of Triton kernels, if it can take these rows."""
    if not on_triton.takes(rows):
        return None
    from trl_moe_ext.kernels import triton_rows

    return triton_rows
