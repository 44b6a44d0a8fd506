"""Masks computed by a counter: the right share, independent elements, independent of the order of rows."""

from __future__ import annotations

import pytest
import torch

from trl_moe_ext.kernels.dropout import draw_seed, drop, keep_mask


def seed(value=7):
    return torch.tensor(value, dtype=torch.int32)


@pytest.mark.parametrize("p", [0.05, 0.25, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p(p):
    keep = keep_mask(seed(), torch.arange(2048), 1024, p)
    n = keep.numel()
    assert abs((1 - keep.double().mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-16


def test_a_probability_close_to_one_drops_nearly_everything():
    assert keep_mask(seed(), torch.arange(64), 64, 1 - 1e-7).double().mean() < 0.01


def test_rows_columns_and_seeds_are_uncorrelated():
    keep = keep_mask(seed(), torch.arange(1024), 1024, 0.5).double() * 2 - 1
    other = keep_mask(seed(8), torch.arange(1024), 1024, 0.5).double() * 2 - 1
    bound = 5 / 1024
    assert abs((keep[:, 1:] * keep[:, :-1]).mean()) < bound
    assert abs((keep[:, 2:] * keep[:, :-2]).mean()) < bound
    assert abs((keep[1:] * keep[:-1]).mean()) < bound
    assert abs((keep * other).mean()) < bound
    # No row and no column is dropped more often than chance allows.
    assert keep.mean(0).abs().max() < 6 / 32
    assert keep.mean(1).abs().max() < 6 / 32


def test_a_row_keeps_its_mask_wherever_it_stands():
    pairs = torch.arange(50)
    shuffled = torch.randperm(50)
    torch.testing.assert_close(keep_mask(seed(), pairs[shuffled], 9, 0.5), keep_mask(seed(), pairs, 9, 0.5)[shuffled])


def test_the_expectation_is_kept():
    x = torch.ones(512, 512)
    assert abs(drop(x, seed(), torch.arange(512), 0.25).mean() - 1) < 0.01


def test_the_seed_comes_from_torchs_generator():
    torch.manual_seed(3)
    first = draw_seed(torch.device("cpu"))
    state = torch.get_rng_state()
    second = draw_seed(torch.device("cpu"))
    torch.set_rng_state(state)
    assert first != second
    assert draw_seed(torch.device("cpu")) == second
