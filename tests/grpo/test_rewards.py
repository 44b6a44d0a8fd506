"""Calls of reward functions: what may come back, and what becomes of those that hang, raise or die."""

from __future__ import annotations

import asyncio
import functools
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.grpo import reward_functions
from tests.grpo.worker_runs import wait_until
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rewards import event_loop
from trl_moe_ext.grpo.rewards.answers import RewardTimeoutError, answer_of, checked_rewards
from trl_moe_ext.grpo.rewards.calls import call_reward, one_of, reward_name
from trl_moe_ext.grpo.rewards.event_loop import EventLoop
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
        (1.0, [NAN, NAN, NAN], "not a list of numbers"),
        (None, [NAN, NAN, NAN], "returned None, not a list"),
        ((float(i) for i in range(3)), [0, 1, 2], None),
        ([1.0, 10**5000, 3.0], [1, NAN, 3], "returned a value of type int"),
        ([1.0, torch.ones(2), 3.0], [1, NAN, 3], "returned tensor"),
        ([None, 2.0], [NAN, NAN, NAN], "2 rewards for 3 completions"),
    ],
    ids=[
        "numbers",
        "array",
        "tensor",
        "None",
        "not finite",
        "text",
        "too few",
        "one number",
        "nothing",
        "generator",
        "huge number",
        "two numbers in one",
        "too few and None",
    ],
)
def test_what_counts_as_a_reward(returned, rewards, told):
    found, wrong = checked_rewards(answer_of(returned), 3)
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


@pytest.fixture
def loop():
    loop = EventLoop()
    yield loop
    loop.stop()


def test_what_a_generator_raises_is_raised_in_the_call(loop):
    def each(completions):
        for completion in completions:
            yield {"a": 1.0}[completion]

    assert call_reward(each, {"completions": "aa"}, loop, 10).rewards == [1.0, 1.0]
    with pytest.raises(KeyError):
        call_reward(each, {"completions": "ab"}, loop, 10)


def test_an_async_function_is_awaited(loop):
    assert call_reward(Judge(), {"completions": ["a", "b"]}, loop, 10).rewards == [1.0, 1.0]


def test_async_calls_share_one_loop_even_after_one_that_exits(loop):
    async def which(**kwargs):
        return [float(id(asyncio.get_running_loop()))]

    async def leave(**kwargs):
        raise SystemExit(3)

    first = call_reward(which, {}, loop, 10)
    with pytest.raises(RuntimeError, match="SystemExit"):
        call_reward(leave, {}, loop, 10)
    assert call_reward(which, {}, loop, 10) == first


def test_a_loop_that_is_blocked_is_replaced(loop, monkeypatch, caplog):
    monkeypatch.setattr(event_loop, "ANSWERS_WITHIN_S", 0.05)
    release = threading.Event()

    async def block(**kwargs):
        release.wait(60)

    with pytest.raises(RewardTimeoutError):
        call_reward(block, {}, loop, 0.05)
    assert call_reward(Judge(), {"completions": ["a"]}, loop, 10).rewards == [1.0]
    assert caplog.text.count("blocks its event loop") == 1
    release.set()


def test_an_async_function_is_cancelled_when_it_takes_too_long(loop):
    cancelled = threading.Event()

    async def slow(**kwargs):
        try:
            await asyncio.sleep(3600)
        finally:
            cancelled.set()

    async def own_timeout(**kwargs):
        raise TimeoutError("of a request inside")

    with pytest.raises(RewardTimeoutError):
        call_reward(slow, {}, loop, 0.05)
    assert cancelled.wait(10)
    with pytest.raises(TimeoutError, match="of a request inside"):
        call_reward(own_timeout, {}, loop, 10)


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
    assert [future.result(20).rewards for future in futures] == [[1.0]] * 7
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
    assert waiting.result(20).rewards == [1.0]
    release.set()  # too late: what it returns now goes nowhere
    assert pool.submit(0, {"index": 2}).result(20).rewards == [2.0]


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_async_functions_share_what_belongs_to_their_loop(make_pool, kind):
    pool = make_pool(reward_functions.limited, kind=kind, concurrency=4 if kind == "thread" else 1)
    futures = [pool.submit(0, {"completions": ["a"]}) for _ in range(4)]
    assert [future.result(120).rewards for future in futures] == [[1.0]] * 4


def test_a_call_that_ends_while_it_is_given_up_does_no_harm(make_pool, monkeypatch):
    """The worker forgets its call as soon as the lock of `expire` is free."""
    release = threading.Event()

    def hang(**kwargs):
        release.wait(20)
        return [1.0]

    pool = make_pool(hang, concurrency=1, timeout_s=0.1)
    hung = pool.submit(0, {})

    class Lock:
        lock = pool._lock

        def __enter__(self):
            self.lock.acquire()

        def __exit__(self, *_):
            self.lock.release()
            if threading.current_thread() is threading.main_thread() and worker.abandoned:
                release.set()
                worker.thread.join(20)

    worker = pool._workers[0]
    time.sleep(0.2)
    monkeypatch.setattr(pool, "_lock", Lock())
    pool.expire()
    assert worker.call is None
    assert isinstance(hung.exception(0), RewardTimeoutError)


def test_stop_ends_async_calls_at_once(make_pool):
    async def slow(**kwargs):
        await asyncio.sleep(3600)

    pool = make_pool(slow, timeout_s=100)
    pool.submit(0, {})
    time.sleep(0.1)
    began = time.monotonic()
    pool.stop(grace_s=20)
    assert time.monotonic() - began < 5
    assert not reward_threads()


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
    assert pool.submit(1, {}).result(20).rewards == [1.0]


def test_processes_are_killed_when_they_hang_or_die_and_replaced(make_pool):
    functions = (
        reward_functions.process_id,
        reward_functions.hang,
        reward_functions.die,
        reward_functions.raise_for_bad,
    )
    pool = make_pool(*functions, kind="process", concurrency=1, timeout_s=1.0)
    first = pool.submit(0, {"completions": ["a"]}).result(120).rewards[0]
    assert first != os.getpid()
    assert pool.submit(0, {"completions": ["a"]}).result(60).rewards[0] == first, "a process serves many calls"
    with pytest.raises(RewardTimeoutError):
        pool.submit(1, {"completions": ["hang"]}).result(60)
    with pytest.raises(ProcessLookupError):
        os.kill(int(first), 0)
    with pytest.raises(RewardCallError, match="exit code 7"):
        pool.submit(2, {"completions": ["a"]}).result(120)
    with pytest.raises(RewardCallError, match="ValueError: that is bad"):
        pool.submit(3, {"completions": ["bad"]}).result(120)
    last = pool.submit(0, {"completions": ["a"]}).result(60).rewards[0]
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


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_killed_process_has_started_is_killed_with_it(make_pool, tmp_path):
    pool = make_pool(reward_functions.sandbox, kind="process", concurrency=1, timeout_s=2.0)
    with pytest.raises(RewardTimeoutError):
        pool.submit(0, {"completions": ["a"], "pid_file": [str(tmp_path / "pid")]}).result(120)
    wait_until(lambda: not is_running(int((tmp_path / "pid").read_text())))


def test_a_reward_process_may_have_processes_of_its_own(make_pool):
    pool = make_pool(reward_functions.in_processes, kind="process", concurrency=1, timeout_s=100)
    assert pool.submit(0, {"completions": ["a", "b"]}).result(120).rewards == [0.0, 1.0]


def run_script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), str(tmp_path)])}
    return subprocess.run(
        [sys.executable, str(path)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180
    )


def test_a_script_that_forgets_its_pool_ends_all_the_same(tmp_path):
    done = run_script(
        tmp_path,
        """
        from tests.grpo import reward_functions
        from trl_moe_ext.grpo.rewards.pool import RewardPool
        if __name__ == "__main__":
            pool = RewardPool(
                [reward_functions.length], kind="process", concurrency=1, timeout_s=60, on_done=lambda: None
            )
            print(pool.submit(0, {"completions": ["ab"]}).result(120).rewards)
        """,
    )
    assert (done.returncode, done.stdout) == (0, "[2.0]\n"), done.stderr


@pytest.mark.slow
def test_an_unguarded_script_does_not_train_again_in_its_reward_processes(tmp_path):
    done = run_script(
        tmp_path,
        """
        from tests.grpo import reward_functions
        from tests.grpo.trainer_runs import make_trainer
        trainer = make_trainer(
            "out", reward_funcs=reward_functions.length, reward_pool="process", reward_concurrency=1
        )
        print("trains", flush=True)
        trainer.train()
        """,
    )
    assert done.returncode != 0
    assert done.stdout == "trains\n", "once"
    assert 'guard the script by `if __name__ == "__main__":`' in done.stderr
    assert "length did not start" in done.stderr
