"""The first signal asks for an end, the second makes it; afterwards the handlers are those of before."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from trl_moe_ext.grpo.rollout.sample_queue import StopRequested
from trl_moe_ext.grpo.signals import Interruption

BOTH = [signal.SIGTERM, signal.SIGINT]
ENDS = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}


@pytest.fixture
def asked():
    return []


@pytest.mark.parametrize("number", BOTH, ids=lambda number: number.name)
def test_the_first_signal_asks(number, asked, capfd):
    before = [signal.getsignal(each) for each in BOTH]
    with Interruption(lambda: asked.append(1)) as interruption:
        interruption.check()
        interruption.end_process()
        os.kill(os.getpid(), number)
        assert asked == [1]
        with pytest.raises(StopRequested):
            interruption.check()
    assert [signal.getsignal(each) for each in BOTH] == before
    assert number.name in capfd.readouterr().err
    with pytest.raises(ENDS[number]) as end:
        interruption.end_process()
    if number == signal.SIGTERM:
        assert end.value.code == 143


@pytest.mark.parametrize("number", BOTH, ids=lambda number: number.name)
def test_the_second_signal_ends(number, asked):
    before = [signal.getsignal(each) for each in BOTH]
    with Interruption(lambda: asked.append(1)):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(ENDS[number]):
            os.kill(os.getpid(), number)
        assert [signal.getsignal(each) for each in BOTH] == before, "a third one meets what was there before"
    assert asked == [1]


def test_other_threads_leave_the_handlers_alone(asked):
    before = [signal.getsignal(each) for each in BOTH]
    found = []

    def enter():
        with Interruption(lambda: asked.append(1)) as interruption:
            found.extend([interruption.signal, *(signal.getsignal(each) for each in BOTH)])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [None, *before]
