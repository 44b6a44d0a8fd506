"""Routings made of plain tensors: what the hooks of a model would have seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor


def observed(probabilities: Tensor, top_k: int, kept: Tensor | None = None) -> Any:
    """What a statistic reads of a `Routing`, with the ``top_k`` most probable experts chosen.

    ``rows`` are the numbers of the tokens, by which those of a part are found again.
    """
    return SimpleNamespace(
        logits=probabilities.log(),
        probabilities=probabilities,
        top_k_index=probabilities.topk(top_k, -1).indices,
        kept=kept,
        rows=torch.arange(len(probabilities)),
    )


def part_of(routing: Any, rows: Tensor) -> Any:
    """The same routing with some of its tokens only."""
    return SimpleNamespace(**{k: v if v is None else v[rows] for k, v in vars(routing).items()})


@st.composite
def split_routings(draw: st.DrawFn) -> tuple[Any, list[Any]]:
    """A routing with padding, and the same tokens split at random into micro-batches, some of them empty."""
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, experts))
    tokens = draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 3 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    kept = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=torch.bool)
    whole = observed(logits.softmax(-1), top_k, kept)
    micro_batch = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=tokens, max_size=tokens)), dtype=torch.int64)
    parts = [part_of(whole, micro_batch == number) for number in range(4)]
    for part in parts:
        if part.kept.all() and draw(st.booleans()):
            part.kept = None  # A micro-batch without padding.
    return whole, parts
