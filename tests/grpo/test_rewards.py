"""Calls of reward functions: what may come back, and what becomes of those that hang, raise or die."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import threading
import time

import numpy as np
import pytest
import torch

from tests.grpo import reward_functions
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rewards.calls import RewardTimeoutError, call_reward, checked_rewards, one_of, reward_name
from trl_moe_ext.grpo.rewards.pool import RewardPool
from trl_moe_ext.grpo.rewards.process import RewardCallError

NAN = math.nan


@pytest.mark.parametrize(
    ("returned", "rewards", "told"),
    [
        ([1, 2.5, True], [1, 2.5, 1], None),
        (np.array([1.0, 2.0, 3.0], dtype=np.float32), [1, 2, 3], None),
        (torch.tensor([1.0, 2.0, 3.0]), [1, 2, 3], None),
        ([1.0, None, 3.0], [1, NAN, 3], "returned None"),
        ([1.0, NAN, math.inf], [1, NAN, NAN], "returned inf"),
        ([1.0, "much", 3.0], [1, NAN, 3], "returned 'much'"),
        ([1.0, 2.0], [NAN, NAN, NAN], "2 rewards for 3 completions"),
        (1.0, [NAN, NAN, NAN], "not a list of 3 numbers"),
        (None, [NAN, NAN, NAN], "returned None, not a list"),
    ],
    ids=["numbers", "array", "tensor", "None", "not finite", "text", "too few", "one number", "nothing"],
)
def test_what_counts_as_a_reward(returned, rewards, told):
    found, wrong = checked_rewards(returned, 3)
    np.testing.assert_array_equal(found, rewards)
    assert wrong is None if told is None else told in wrong


class Judge:
    async def __call__(self, completions, **kwargs):
        await asyncio.sleep(0)
        return [1.0] * len(completions)


def test_names_are_those_of_trl():
    assert reward_name(reward_functions.length) == "length"
    assert reward_name(functools.partial(reward_functions.length, x=1)) == "length"
    assert reward_name(Judge()) == "Judge"


def test_an_async_function_is_awaited():
    assert call_reward(Judge(), {"completions": ["a", "b"]}, 10) == [1.0, 1.0]


def test_an_async_function_is_cancelled_when_it_takes_too_long():
    async def slow(**kwargs):
        await asyncio.sleep(3600)

    async def own_timeout(**kwargs):
        raise TimeoutError("of a request inside")

    with pytest.raises(RewardTimeoutError):
        call_reward(slow, {}, 0.05)
    with pytest.raises(TimeoutError, match="of a request inside"):
        call_reward(own_timeout, {}, 10)


def test_arguments_of_a_single_completion():
    assert one_of({"completions": ["a", "b"], "answer": [1, 2]}, 1) == {"completions": ["b"], "answer": [2]}


@pytest.fixture
def make_pool():
    pools = []

    def make(*functions, kind="thread", concurrency=2, timeout_s=20.0):
        pools.append(
            RewardPool(functions, kind=kind, concurrency=concurrency, timeout_s=timeout_s, on_done=lambda: None)
        )
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop(grace_s=0.2)


def reward_threads():
    return [thread for thread in threading.enumerate() if thread.name == "moe-grpo-reward"]


def test_calls_run_side_by_side_up_to_the_bound(make_pool):
    running, most, lock, release = 0, 0, threading.Lock(), threading.Event()

    def count(**kwargs):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        release.wait(20)
        with lock:
            running -= 1
        return [1.0]

    pool = make_pool(count, concurrency=3)
    futures = [pool.submit(0, {}) for _ in range(7)]
    while running < 3:
        time.sleep(0.02)
    release.set()
    assert [future.result(20) for future in futures] == [[1.0]] * 7
    assert most == 3


def test_a_thread_that_hangs_is_replaced(make_pool):
    release = threading.Event()

    def hang_first(index, **kwargs):
        if index == 0:
            release.wait(60)
        return [float(index)]

    pool = make_pool(hang_first, concurrency=1, timeout_s=0.2)
    hung, waiting = pool.submit(0, {"index": 0}), pool.submit(0, {"index": 1})
    while not hung.done():
        pool.expire()
        time.sleep(0.02)
    with pytest.raises(RewardTimeoutError):
        hung.result()
    assert waiting.result(20) == [1.0]
    release.set()  # too late: what it returns now goes nowhere
    assert pool.submit(0, {"index": 2}).result(20) == [2.0]


def test_stop_leaves_no_thread_and_cancels_what_waits(make_pool):
    pool = make_pool(lambda seconds: time.sleep(seconds), concurrency=1)
    pool.submit(0, {"seconds": 0.3})
    waiting = pool.submit(0, {"seconds": 0})
    pool.stop(grace_s=20)
    assert waiting.cancelled()
    assert not reward_threads()


def test_a_function_that_exits_costs_its_call_only(make_pool):
    def leave(**kwargs):
        raise SystemExit(3)

    pool = make_pool(leave, lambda **kwargs: [1.0], concurrency=1)
    with pytest.raises(SystemExit):
        pool.submit(0, {}).result(20)
    assert pool.submit(1, {}).result(20) == [1.0]


def test_processes_are_killed_when_they_hang_or_die_and_replaced(make_pool):
    functions = (
        reward_functions.process_id,
        reward_functions.hang,
        reward_functions.die,
        reward_functions.raise_for_bad,
    )
    pool = make_pool(*functions, kind="process", concurrency=1, timeout_s=1.0)
    first = pool.submit(0, {"completions": ["a"]}).result(120)[0]
    assert first != os.getpid()
    assert pool.submit(0, {"completions": ["a"]}).result(60)[0] == first, "a process serves many calls"
    with pytest.raises(RewardTimeoutError):
        pool.submit(1, {"completions": ["hang"]}).result(60)
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)
    with pytest.raises(RewardCallError, match="exit code 7"):
        pool.submit(2, {"completions": ["a"]}).result(120)
    with pytest.raises(RewardCallError, match="ValueError: that is bad"):
        pool.submit(3, {"completions": ["bad"]}).result(120)
    last = pool.submit(0, {"completions": ["a"]}).result(60)[0]
    hung = pool.submit(1, {"completions": ["hang"]})
    while not pool._calls.empty():
        time.sleep(0.02)
    pool.stop(grace_s=20)
    assert isinstance(hung.exception(20), RewardCallError)
    with pytest.raises(ProcessLookupError):
        os.kill(int(last), 0)
    assert not reward_threads()


def test_a_function_that_no_other_process_can_have_is_refused_at_once(make_pool):
    with pytest.raises(ConfigError, match="<lambda> can't be sent to a process"):
        make_pool(lambda **kwargs: [1.0], kind="process")
