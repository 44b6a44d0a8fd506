"""Attention over a packed prefix tree is that of each sample by itself, and so are its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import assert_gradient_close, assert_output_close
from trl_moe_ext.grpo.batches.packing import packed_order
from trl_moe_ext.grpo.batches.tree_attention import varlen_attention
from trl_moe_ext.grpo.trl_async import TreeRow, packing_module
from trl_moe_ext.hosts.trl_async_grpo import TreeKernel

HEADS, KEY_HEADS, SIZE = 4, 2, 8
# Two share five tokens, and one of them forks again; one is by itself; one is a single token.
SAMPLES = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 8], [1, 2, 3, 4, 5, 8, 9, 9], [7, 6, 5], [4]]


def packed(samples: list[list[int]] = SAMPLES) -> tuple[TreeRow, dict[str, Tensor]]:
    row = TreeRow()
    for ids in samples:
        ones = np.ones(len(ids))
        sample = {"input_ids": np.array(ids), "completion_mask": ones, "old_log_probs": ones}
        row.add(sample | {"advantage": 1.0, "group_id": 0})
    return row, row.pack()


def dense(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """One sequence, ``(length, heads, size)``, by the definition."""
    key, value = (rows.repeat_interleave(HEADS // KEY_HEADS, dim=1) for rows in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(SIZE)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    places = torch.arange(len(query))
    distance = places[:, None] - places[None, :]
    seen = (distance >= 0) & (distance < (window or len(query)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), value)


def sample_by_sample(row: TreeRow, rows: tuple[Tensor, ...], window: int | None, softcap: float | None) -> Tensor:
    """The output of each packed token, from the first sample that it is of."""
    place = {node: at for at, node in enumerate(packed_order(row))}
    found: dict[int, Tensor] = {}
    for nodes in row.sample_nodes:
        at = [place[node] for node in nodes]
        output = dense(*(each[at] for each in rows), window, softcap)
        for position, value in zip(at, output):
            found.setdefault(position, value)
    return torch.stack([found[position] for position in range(len(place))])


def in_trl(pack: dict[str, Tensor], rows: tuple[Tensor, ...], window: int | None, softcap: float | None) -> Tensor:
    """The output of each packed token by TRL's `tree_attention`, which calls what it takes for a kernel."""
    longest_q, longest_k = pack["tree_max_seqlens"].tolist()
    output, _ = packing_module.tree_attention(
        nn.Module(),
        *(each.transpose(0, 1).unsqueeze(0) for each in rows),
        None,
        **{name: pack[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")},
        tree_max_seqlen_q=longest_q,
        tree_max_seqlen_k=longest_k,
        sliding_window=window,
        softcap=softcap,
    )
    return output.squeeze(0)


def random_rows(count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shapes = [(count, heads, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return tuple((2 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_() for shape in shapes)


@pytest.fixture(autouse=True)
def _kernel(monkeypatch):
    def nothing():
        raise AssertionError("a kernel was fetched for a CPU")

    kernel = TreeKernel(nothing)
    monkeypatch.setattr(packing_module, "_flash_attn", lambda: kernel)
    # It looks for the dtype of a real module.
    monkeypatch.setattr(packing_module, "get_target_dtype", lambda query, module: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
def test_as_each_sample_by_itself(window, softcap, dtype):
    row, pack = packed()
    rows = random_rows(len(row.tokens), dtype)
    expected_rows = tuple(each.detach().double().requires_grad_() for each in rows)
    expected = sample_by_sample(row, expected_rows, window, softcap)
    found = in_trl(pack, rows, window, softcap)
    assert found.dtype == dtype
    assert_output_close(found, expected, dtype)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights.to(dtype)).sum().backward()
    for name, mine, theirs in zip("qkv", rows, expected_rows):
        assert_gradient_close(mine.grad, theirs.grad, dtype, name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 3])
def test_on_a_gpu_as_on_a_cpu(window, dtype):
    row, pack = packed()
    rows = random_rows(len(row.tokens), dtype)
    there = tuple(each.detach().cuda().requires_grad_() for each in rows)
    bounds = [pack[name] for name in ("tree_cu_seqlens_q", "tree_cu_seqlens_k")]
    index, options = pack["tree_kv_index"], {"causal": True, "window_size": (-1 if window is None else window - 1, 0)}
    expected = sample_by_sample(row, tuple(each.double() for each in rows), window, None)
    query, key, value = there
    gathered = [each.index_select(0, index.cuda()) for each in (key, value)]
    found = varlen_attention(query, *gathered, *(each.cuda() for each in bounds), 0, 0, **options)
    assert_output_close(found.cpu(), expected, dtype)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights.to("cuda", dtype)).sum().backward()
    for name, mine, theirs in zip("qkv", there, rows):
        assert_gradient_close(mine.grad.cpu(), theirs.grad, dtype, name)


@pytest.mark.parametrize("wrong", [{"window": 2}, {"softcap": 5.0}], ids=str)
def test_the_comparison_can_fail(wrong):
    row, pack = packed()
    rows = random_rows(len(row.tokens), torch.float64)
    options = {"window": 3, "softcap": 1.5}
    expected = sample_by_sample(row, rows, **options)
    with pytest.raises(AssertionError, match="relative error"):
        assert_output_close(in_trl(pack, rows, **options | wrong), expected, torch.float64)


def test_without_causal_every_key_is_seen():
    rows = random_rows(5, torch.float64)
    bounds = torch.tensor([0, 5])
    found = varlen_attention(*rows, bounds, bounds, 5, 5)
    key, value = (each.repeat_interleave(HEADS // KEY_HEADS, dim=1) for each in rows[1:])
    scores = torch.einsum("qhd,khd->hqk", rows[0], key) / math.sqrt(SIZE)
    assert_output_close(found, torch.einsum("hqk,khd->qhd", scores.softmax(-1), value), torch.float64)
