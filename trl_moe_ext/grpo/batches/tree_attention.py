"""Attention over sequences of many lengths laid end to end, by PyTorch alone: for CPUs, and dtypes without a kernel.

TRL's packing hands each segment of its prefix tree to a flash attention kernel as a sequence of its own, with the keys
of the whole path from the root to it. This function takes the same arguments, and has gradients.

Legend: S sequences, Q and K query and key rows of all of them, A heads, G heads of keys (A is a multiple), D size of
a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["varlen_attention"]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """As `flash_attn_varlen_func` of FlashAttention.

    The last query row of a sequence stands at its last key row: a sequence with fewer queries than keys is the end of
    a longer one.

    Args:
        query: ``(Q, A, D)``, any floating-point dtype.
        key: ``(K, G, D)``.
        value: ``(K, G, D)``.
        cu_seqlens_q: ``(S + 1,)`` integers, where the query rows of each sequence begin, and Q.
        cu_seqlens_k: ``(S + 1,)`` integers, the same of its key rows; at least as many as query rows.
        max_seqlen_q: not needed here.
        max_seqlen_k: not needed here.
        softmax_scale: what scores are multiplied by; ``D ** -0.5`` by default.
        causal: no query sees keys after its own place.
        window_size: how many keys before and after its own place a query sees; -1 for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for no cap.

    Returns:
        ``(Q, A, D)`` in the dtype of the query.
    """
    if causal:
        window_size = window_size[0], 0
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    outputs = [
        _attention(query[q:q_end], key[k:k_end], value[k:k_end], window_size, scale, softcap)
        for q, q_end, k, k_end in zip(starts_q, starts_q[1:], starts_k, starts_k[1:])
    ]
    return torch.cat(outputs)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, window_size: tuple[int, int], scale: float, softcap: float
) -> Tensor:
    """Of one sequence; arguments and result as in `varlen_attention`."""
    is_square = len(query) == len(key)
    query, key, value = (rows.transpose(0, 1).unsqueeze(0) for rows in (query, key, value))
    if softcap:
        seen = _visible(query.shape[2], key.shape[2], window_size, query.device)
        found = _capped(query, key, value, seen, scale, softcap)
    elif is_square and window_size == (-1, 0):
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    else:
        seen = _visible(query.shape[2], key.shape[2], window_size, query.device)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=True)
    return found.squeeze(0).transpose(0, 1)


def _visible(queries: int, keys: int, window_size: tuple[int, int], device: torch.device) -> Tensor:
    """``(queries, keys)`` bool: which keys a query sees."""
    place = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    after = torch.arange(keys, device=device).unsqueeze(0) - place
    before, behind = (keys if width < 0 else width for width in window_size)
    return (after >= -before) & (after <= behind)


def _capped(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float) -> Tensor:
    """Step by step, in float32 or wider, because no function of PyTorch caps the scores."""
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    key, value = (rows.repeat_interleave(groups, dim=1) for rows in (key, value))
    scores = query.to(wide) @ key.to(wide).mT * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value.to(wide)).to(query.dtype)
