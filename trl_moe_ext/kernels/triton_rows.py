"""Triton kernels for routed rows: each reads its rows once and writes its result once, with sums in float32.

`row_ops` says what each function computes. Imported only where Triton is installed.

Legend: T tokens, K top_k, S = T*K routed rows sorted by expert, n columns, I intermediate.
"""

# Triton compiles these functions: their arguments are pointers, scalars and constants, and annotations mean constants.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trl_moe_ext.kernels.dispatch import Dispatch
from trl_moe_ext.kernels.gates import Gate

__all__ = ["combine", "device_of", "gated", "gated_backward"]

_COLUMNS = 1024  # at once, of row-wise kernels


def gated(gate: Gate, h: Tensor) -> Tensor:
    act, form, width = _form(gate, h)
    a = h.new_empty(h.shape[0], width)
    with device_of(h):
        _gated_kernel[(h.shape[0],)](h, a, width, h.stride(0), gate.alpha, gate.limit, act, form, _block(width))
    return a


def gated_backward(gate: Gate, h: Tensor, d_a: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    act, form, width = _form(gate, h)
    d_h = h.new_empty(h.shape)  # rows of a grouped product may be padded, these are not
    d_w = None if weights is None else h.new_empty(h.shape[0], dtype=torch.float32)
    with device_of(h):
        _gated_backward_kernel[(h.shape[0],)](
            h, d_a, weights, d_h, d_w, width, h.stride(0), d_h.stride(0), d_a.stride(0), gate.alpha, gate.limit,
            act, form, weights is not None, _block(width),
        )  # fmt: skip
    # Each program has read its part of d_a before it writes a there.
    return d_h, d_a, d_w


def combine(rows: Tensor, weights: Tensor | None, dispatch: Dispatch) -> Tensor:
    tokens, columns = rows.shape[0] // dispatch.top_k, rows.shape[1]
    out = rows.new_empty(tokens, columns)
    block = _block(columns)
    with device_of(rows):
        _combine_kernel[(tokens, triton.cdiv(columns, block))](
            rows, None if weights is None else weights.contiguous(), dispatch.position, dispatch.offsets, out,
            dispatch.offsets.shape[0], columns, rows.stride(0), dispatch.top_k, weights is not None, block,
        )  # fmt: skip
    return out


def device_of(rows: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever its arguments are. Its interpreter takes tensors of a CPU."""
    return torch.cuda.device(rows.device) if rows.is_cuda else nullcontext()


def _block(columns: int) -> int:
    return int(min(_COLUMNS, triton.next_power_of_2(columns)))


# How gate and up lie in a row of h.
_PLAIN, _HALVES, _INTERLEAVED = 0, 1, 2
_ACTS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4}


def _form(gate: Gate, h: Tensor) -> tuple[int, int, int]:
    """Number of the activation, layout of h, and I."""
    if gate.name == "clamped":
        return -1, _INTERLEAVED, h.shape[1] // 2
    if gate.name.endswith("_glu"):
        return _ACTS[gate.name.removesuffix("_glu")], _HALVES, h.shape[1] // 2
    return _ACTS[gate.name], _PLAIN, h.shape[1]


@triton.jit
def _act(x, ACT: tl.constexpr):
    """f(x) and f'(x)."""
    if ACT == 0:
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    elif ACT == 1:
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == 2:
        t = 2 * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1
        slope = 0.7978845608028654 * (1 + 0.134145 * x * x)
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope
    elif ACT == 3:
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    else:
        positive = tl.maximum(x, 0.0)
        return positive * positive, 2 * positive


@triton.jit
def _gate_of(h, column, inside, width, alpha, limit, ACT: tl.constexpr, FORM: tl.constexpr):
    """The activation a of some columns, and its derivatives by gate and by up (by h alone, and 0, without a gate)."""
    if FORM == 0:
        x = tl.load(h + column, inside, 0.0).to(tl.float32)
        f, slope = _act(x, ACT)
        return f, slope, tl.zeros_like(f)
    elif FORM == 1:
        x = tl.load(h + column, inside, 0.0).to(tl.float32)
        up = tl.load(h + width + column, inside, 0.0).to(tl.float32)
        f, slope = _act(x, ACT)
        return f * up, slope * up, f
    else:
        raw = tl.load(h + 2 * column, inside, 0.0).to(tl.float32)
        raw_up = tl.load(h + 2 * column + 1, inside, 0.0).to(tl.float32)
        x, up = tl.minimum(raw, limit), tl.minimum(tl.maximum(raw_up, -limit), limit)
        s = tl.sigmoid(alpha * x)
        f = x * s
        d_x = (up + 1) * s * (1 + alpha * x * (1 - s))
        # Outside its bounds, which belong to the inside, a clamped value has no gradient.
        return (up + 1) * f, tl.where(raw <= limit, d_x, 0.0), tl.where(tl.abs(raw_up) <= limit, f, 0.0)


@triton.jit
def _gated_kernel(h, a, width, stride, alpha, limit, ACT: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    h += row * stride
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value, _, _ = _gate_of(h, column, inside, width, alpha, limit, ACT, FORM)
        tl.store(a + row * width + column, value.to(a.dtype.element_ty), inside)


@triton.jit
def _gated_backward_kernel(
    h, d_a, weights, d_h, d_w, width, stride, d_h_stride, d_a_stride, alpha, limit,
    ACT: tl.constexpr, FORM: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h += row * stride
    d_h += row * d_h_stride
    d_a += row * d_a_stride
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + row).to(tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        value, by_gate, by_up = _gate_of(h, column, inside, width, alpha, limit, ACT, FORM)
        grad = tl.load(d_a + column, inside, 0.0).to(tl.float32)
        # Rounded as what is stored: the gradient of the weight is that of the stored activation.
        rounded = value.to(d_a.dtype.element_ty)
        tl.store(d_a + column, rounded, inside)
        product += tl.where(inside, rounded.to(tl.float32) * grad, 0.0)
        grad *= weight
        kind = d_h.dtype.element_ty
        if FORM == 0:
            tl.store(d_h + column, (grad * by_gate).to(kind), inside)
        elif FORM == 1:
            tl.store(d_h + column, (grad * by_gate).to(kind), inside)
            tl.store(d_h + width + column, (grad * by_up).to(kind), inside)
        else:
            tl.store(d_h + 2 * column, (grad * by_gate).to(kind), inside)
            tl.store(d_h + 2 * column + 1, (grad * by_up).to(kind), inside)
    if WEIGHTED:
        tl.store(d_w + row, tl.sum(product, 0))


@triton.jit
def _combine_kernel(
    rows, weights, position, offsets, out, num_experts, columns, stride, TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    end = tl.load(offsets + num_experts - 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(TOP_K):
        row = tl.load(position + token * TOP_K + slot)
        served = (column * 0 + row) < end
        value = tl.load(rows + row * stride + column, inside & served, 0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * TOP_K + slot).to(tl.float32)
        total += value
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), inside)
