"""The queue between conductor and trainer: whole groups, none too old, and nobody waits for what will not come."""

from __future__ import annotations

import queue
import signal
import threading
import time

import numpy as np
import pytest

from trl_moe_ext.grpo.backends.protocol import Segment
from trl_moe_ext.grpo.rollout.sample_queue import SampleQueue, StopRequested
from trl_moe_ext.grpo.sample import MoeRolloutSample, SampleMetrics
from trl_moe_ext.grpo.timeline import TRAINER, Timeline


def sample(group_id, version):
    return MoeRolloutSample(
        prompt="p",
        completion="c",
        input_ids=np.zeros(2),
        completion_mask=np.zeros(2),
        old_log_probs=np.zeros(2),
        advantage=1.0,
        model_version=version,
        group_id=group_id,
        metrics=SampleMetrics(),
        segments=(Segment(version, 1),),
    )


class Harness:
    def __init__(self, max_staleness=1):
        self.given_back, self.pushed, self.timeline = [], [], Timeline()
        self.woken = threading.Event()
        self.queue = SampleQueue(
            max_staleness=max_staleness,
            give_back=self.given_back.append,
            push_metrics=self.pushed.append,
            timeline=self.timeline,
            wake=self.woken.set,
        )

    def put(self, group_id, *versions):
        self.queue.put_group([sample(group_id, version) for version in versions])


def test_samples_of_a_group_stay_together():
    harness = Harness()
    harness.put(0, 0, 0)
    harness.put(1, 0, 0)
    assert harness.queue.qsize() == 4
    assert [harness.queue.get().group_id for _ in range(4)] == [0, 0, 1, 1]
    assert harness.queue.qsize() == 0


def test_what_was_begun_first_is_trained_on_first():
    harness = Harness()
    for group_id, version in ((5, 1), (3, 1), (9, 0), (4, 1)):
        harness.put(group_id, version)
    assert [harness.queue.get().group_id for _ in range(4)] == [9, 3, 4, 5]


def test_a_group_with_one_sample_too_old_is_given_back_as_a_whole():
    harness = Harness(max_staleness=1)
    harness.put(7, 3, 2)
    harness.put(8, 3, 3)
    harness.queue.trainer_version = 4
    assert harness.queue.get().group_id == 8
    assert harness.given_back == [7]
    assert harness.queue.dropped_groups == 1


def test_a_group_that_was_begun_is_finished_whatever_the_version():
    harness = Harness(max_staleness=0)
    harness.put(0, 0, 0)
    harness.queue.get()
    harness.queue.trainer_version = 5
    assert harness.queue.get().group_id == 0
    assert not harness.given_back


def test_every_sample_adds_to_the_histogram_of_lags():
    harness = Harness(max_staleness=2)
    harness.put(0, 1, 2)
    harness.queue.trainer_version = 2
    harness.queue.get()
    harness.queue.get()
    assert harness.pushed == 2 * [{"lag/0": (0.0, 1.0), "lag/1": (1.0, 1.0), "lag/2": (0.0, 1.0)}]


def test_an_empty_queue_raises_after_the_timeout():
    with pytest.raises(queue.Empty):
        Harness().queue.get(timeout=0.05)


def test_a_failure_ends_a_long_wait_but_not_before_the_last_sample():
    harness = Harness()
    harness.put(0, 0)
    harness.queue.fail()
    assert harness.queue.get().group_id == 0
    with pytest.raises(queue.Empty):
        harness.queue.get(timeout=60)

    waiting = Harness()
    threading.Timer(0.1, waiting.queue.fail).start()
    began = time.monotonic()
    with pytest.raises(queue.Empty):
        waiting.queue.get(timeout=60)
    assert time.monotonic() - began < 30


def test_a_request_to_stop_ends_a_wait_but_takes_no_sample_away():
    harness = Harness()
    threading.Timer(0.1, harness.queue.request_stop).start()
    with pytest.raises(StopRequested):
        harness.queue.get(timeout=60)
    harness.put(0, 0)
    assert harness.queue.get(timeout=60).group_id == 0
    harness.queue.reopen()
    with pytest.raises(queue.Empty):
        harness.queue.get(timeout=0.01)


def test_nothing_that_catches_exceptions_swallows_a_request_to_stop():
    assert not issubclass(StopRequested, Exception)


def test_a_signal_handler_may_ask_for_a_stop_while_the_same_thread_waits():
    harness = Harness()
    before = signal.signal(signal.SIGUSR1, lambda *_: harness.queue.request_stop())
    try:
        timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
        timer.start()
        with pytest.raises(StopRequested):
            harness.queue.get(timeout=60)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_timeline_tells_who_waited():
    harness = Harness()
    threading.Timer(0.2, harness.put, (0, 0)).start()
    harness.queue.get(timeout=60)
    assert harness.timeline.seconds(TRAINER)["waiting"] >= 0.15
    assert harness.timeline.spans()[-1].state == "training"
    assert harness.woken.is_set()
