"""Dropout masks that are computed, not stored: a hash of (seed, token, slot, feature).

The same mask comes out in forward, in backward and in the recompute of gradient checkpointing, in any order of the
rows. The seed is drawn from torch's generator, whose state checkpointing restores.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Two rounds of multiply and xor-shift, the integer finaliser of MurmurHash3; constants as signed 32-bit integers.
_MULTIPLIERS = (-2048144789, -1028477387)
_ROW_STRIDE = -1640531535  # 2^32 / golden ratio: keeps neighbouring rows far apart before they are mixed
_LEVELS = 1 << 16  # each 32-bit hash yields two 16-bit draws


def draw_seed(device: torch.device) -> Tensor:
    """A fresh 0-d int32 seed on `device`, from torch's generator of that device."""
    return torch.randint(0, 2**31 - 1, (), dtype=torch.int32, device=device)


def keep_mask(seed: Tensor, pairs: Tensor, features: int, p: float) -> Tensor:
    """Which elements survive dropout.

    Args:
        seed: 0-d int32 from `draw_seed`.
        pairs: ``(S,)`` the flat (token, slot) pair ``t*K + k`` in each row.
        features: n.
        p: probability of dropping an element, ``0 <= p < 1``, resolved to 1/65536.

    Returns:
        ``(S, n)`` bool, True where the element is kept.
    """
    columns = torch.arange((features + 1) // 2, dtype=torch.int32, device=pairs.device)
    rows = (pairs.to(torch.int32) * _ROW_STRIDE) ^ seed
    bits = _mix(_mix(rows).unsqueeze(1) + columns)
    threshold = min(round(p * _LEVELS), _LEVELS - 1) - _LEVELS // 2
    return bits.view(torch.int16)[:, :features] >= threshold


def drop(x: Tensor, seed: Tensor, pairs: Tensor, p: float) -> Tensor:
    """``(S, n)`` rows with dropped elements set to zero and the rest scaled by ``1 / (1 - p)``."""
    return x * keep_mask(seed, pairs, x.shape[-1], p) * (1.0 / (1.0 - p))


def _mix(bits: Tensor) -> Tensor:
    """Mix the bits of a fresh int32 tensor, in place."""
    for multiplier in _MULTIPLIERS:
        # `>>` on int32 is arithmetic: the mask makes it the logical shift that the mixer is built on.
        bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(multiplier)
    return bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF))
