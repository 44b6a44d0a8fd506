"""Advantages of a group, against numbers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_moe_ext.grpo.rewards.advantages import score_group

NAN = math.nan


def test_one_function():
    scores = score_group(np.array([[0.0, 1.0, 1.0, 2.0]]))
    assert scores.std == pytest.approx(math.sqrt(0.5))
    assert scores.advantages == pytest.approx([-math.sqrt(2), 0, 0, math.sqrt(2)])
    assert scores.teaches


def test_functions_add_up_by_their_weights():
    scores = score_group(np.array([[1.0, 2.0], [10.0, 0.0]]), weights=[2.0, 0.5])
    assert scores.rewards == pytest.approx([7.0, 4.0])
    assert scores.advantages == pytest.approx([1, -1])


def test_a_completion_without_any_reward_counts_for_nothing():
    scores = score_group(np.array([[1.0, NAN, 3.0, NAN], [NAN, NAN, NAN, 8.0]]))
    assert np.isnan(scores.rewards[1])
    assert scores.rewards[[0, 2, 3]] == pytest.approx([1, 3, 8])
    mean, std = 4.0, math.sqrt((9 + 1 + 16) / 3)
    assert scores.advantages == pytest.approx([-3 / std, 0, -1 / std, (8 - mean) / std])


def test_no_reward_at_all_teaches_nothing():
    scores = score_group(np.full((2, 3), NAN))
    assert not scores.teaches
    assert np.isnan(scores.rewards).all()
    assert math.isnan(scores.std)


@pytest.mark.parametrize("great", [1e308, 1e200], ids=["no finite sum", "no finite square"])
def test_sums_that_can_not_be_reckoned_with_are_no_rewards(great):
    scores = score_group(np.array([[great, 1.0, 2.0], [great, 0.0, 0.0]]))
    assert np.isnan(scores.rewards[0])
    assert scores.advantages == pytest.approx([0, -1, 1])
    assert scores.scored
    assert not score_group(np.full((2, 3), great)).scored


@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_equal_rewards_have_no_advantage_to_the_last_bit(reward, count):
    assert not score_group(np.full((1, count), reward)).teaches


@given(st.lists(st.floats(-100, 100) | st.just(NAN), min_size=2, max_size=8))
def test_advantages_sum_to_nothing(rewards):
    assert score_group(np.array([rewards])).advantages.sum() == pytest.approx(0, abs=1e-6)
