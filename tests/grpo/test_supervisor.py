"""A backend that fails is started again, is asked again for what it owes, and is given up at some time."""

from __future__ import annotations

import json
import time

import pytest

from tests.grpo.fakes import FakeBackend, Fault, snapshot
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.protocol import BackendHungError, BackendOutOfMemoryError, GenerationRequest
from trl_moe_ext.grpo.rollout import back_off
from trl_moe_ext.grpo.rollout import supervisor as module
from trl_moe_ext.grpo.rollout.supervisor import RolloutError, Supervisor
from trl_moe_ext.grpo.timeline import GENERATOR, Timeline


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    for watcher in (module, back_off):
        monkeypatch.setattr(watcher, "time", clock)
    return clock


def make(backend, tmp_path, max_restarts=3, max_in_flight=8):
    return Supervisor(
        backend,
        max_restarts=max_restarts,
        max_in_flight=max_in_flight,
        output_dir=str(tmp_path),
        timeline=Timeline(),
    )


def requests(*ids):
    return [GenerationRequest(id, (1, 2), seed=5) for id in ids]


def told(tmp_path):
    return json.loads((tmp_path / "rollout.json").read_text())


def collect(supervisor, count):
    found = []
    while len(found) < count:
        found += supervisor.collect(0.05)
    return [generation.id for generation in found]


def test_what_was_not_finished_is_asked_for_again_in_order(tmp_path, clock):
    backend = FakeBackend(faults=[Fault("collect", after=1)])
    supervisor = make(backend, tmp_path, max_in_flight=3)
    supervisor.drive(snapshot(0))
    supervisor.ask(requests("a", "b", "c", "d"))
    supervisor.submit()
    assert backend.asked == ["a", "b", "c"]
    assert collect(supervisor, 1) == ["a"]
    supervisor.submit()
    assert supervisor.collect(0.05) == []
    assert told(tmp_path)["state"] == "restarting"
    assert (supervisor.live_version, supervisor.outstanding, supervisor.generating) == (None, 3, 0)

    supervisor.drive(snapshot(1))
    assert backend.starts == [0], "it is not started before its time has come"
    clock.now += 1
    supervisor.drive(snapshot(1))
    supervisor.submit()
    assert backend.starts == [0, 1]
    assert collect(supervisor, 3) == ["b", "c", "d"]
    assert told(tmp_path) == {
        "pid": backend.pid,
        "backend": "fake",
        "model_version": 1,
        "restarts": 1,
        "state": "running",
    }
    supervisor.stop()
    assert (told(tmp_path)["state"], told(tmp_path)["pid"]) == ("stopped", None)


def test_the_back_off_doubles_and_ends_with_a_finished_completion(tmp_path, clock):
    backend = FakeBackend(faults=[Fault("start", times=2), Fault("collect", after=1)])
    supervisor = make(backend, tmp_path)
    delays = []
    for _ in range(2):
        supervisor.drive(snapshot(0))
        delays.append(supervisor.seconds_to_start())
        clock.now += delays[-1]
    supervisor.drive(snapshot(0))
    supervisor.ask(requests("a", "b"))
    supervisor.submit()
    assert collect(supervisor, 1) == ["a"]
    supervisor.collect(0)
    delays.append(supervisor.seconds_to_start())
    assert delays == [1, 2, 1]


def test_the_back_off_has_a_limit(tmp_path, clock):
    supervisor = make(FakeBackend(faults=[Fault("start", times=100)]), tmp_path, max_restarts=9)
    for _ in range(9):
        supervisor.drive(snapshot(0))
        clock.now += supervisor.seconds_to_start()
        assert supervisor.seconds_to_start() == 0
    assert clock.now == 100 + 1 + 2 + 4 + 8 + 16 + 4 * 30


def test_a_backend_that_never_starts_is_given_up_with_its_cause(tmp_path, clock):
    backend = FakeBackend(faults=[Fault("start", times=100)])
    supervisor = make(backend, tmp_path, max_restarts=2)
    for _ in range(2):
        supervisor.drive(snapshot(0))
        clock.now += 30
    with pytest.raises(RolloutError, match=r"3 times in a row.*a fault at start.*max_rollout_restarts=2") as given_up:
        supervisor.drive(snapshot(0))
    assert "a fault at start" in str(given_up.value.__cause__)
    assert supervisor.restarts == 2


def test_what_fails_after_an_abort_is_not_started_again(tmp_path, caplog):
    supervisor = make(FakeBackend(faults=[Fault("start", times=100)]), tmp_path, max_restarts=0)
    supervisor.abort()
    supervisor.drive(snapshot(0))
    assert supervisor.live_version is None
    assert not caplog.text


def test_options_that_can_never_work_are_not_tried_again(tmp_path):
    supervisor = make(FakeBackend(faults=[Fault("start", error=ConfigError)]), tmp_path)
    with pytest.raises(ConfigError):
        supervisor.drive(snapshot(0))


def test_out_of_memory_halves_what_is_asked_for_at_a_time(tmp_path, clock, caplog):
    backend = FakeBackend(faults=[Fault("collect", error=BackendOutOfMemoryError)])
    supervisor = make(backend, tmp_path, max_in_flight=5)
    supervisor.drive(snapshot(0))
    supervisor.ask(requests(*"abcdef"))
    supervisor.submit()
    supervisor.collect(0)
    assert "max_inflight_tasks=2" in caplog.text
    assert backend.max_in_flight == 5
    clock.now += 1
    backend.most_in_flight = 0
    supervisor.drive(snapshot(0))
    assert backend.max_in_flight == 2, "it starts with room for so many only"
    found = []
    while len(found) < 6:
        supervisor.submit()
        found += collect(supervisor, 1)
    assert found == list("abcdef")
    assert backend.most_in_flight == 2


@pytest.mark.parametrize("at", ["submit", "load_adapter"])
def test_a_failure_of_any_call_leads_to_a_restart_with_the_newest_adapter(tmp_path, clock, at):
    backend = FakeBackend(faults=[Fault(at, error=BackendHungError)])
    supervisor = make(backend, tmp_path)
    supervisor.drive(snapshot(0))
    supervisor.ask(requests("a"))
    supervisor.submit()
    supervisor.drive(snapshot(1))
    assert supervisor.live_version is None
    assert backend.stops == 1, "a process that hangs takes no memory while the next is waited for"
    clock.now += 1
    supervisor.drive(snapshot(2))
    supervisor.submit()
    assert supervisor.live_version == 2
    assert collect(supervisor, 1) == ["a"]


def test_an_idle_backend_that_dies_is_noticed(tmp_path):
    class Dying(FakeBackend):
        def collect(self, timeout):
            raise BackendHungError("gone")

    supervisor = make(Dying(), tmp_path)
    supervisor.drive(snapshot(0))
    supervisor.collect(1.0)
    assert supervisor.live_version is None


def test_completions_that_nobody_asked_for_are_left_out(tmp_path, caplog):
    supervisor = make(FakeBackend(), tmp_path)
    supervisor.drive(snapshot(0))
    supervisor._backend.submit(requests("x"))
    assert supervisor.collect(0.05) == []
    assert "not asked for" in caplog.text


def test_the_timeline_tells_what_the_generator_does(tmp_path):
    timeline = Timeline()
    supervisor = Supervisor(
        FakeBackend(delay=0.05), max_restarts=0, max_in_flight=2, output_dir=str(tmp_path), timeline=timeline
    )
    supervisor.drive(snapshot(0))
    supervisor.ask(requests("a"))
    supervisor.submit()
    collect(supervisor, 1)
    supervisor.submit()
    time.sleep(0.02)
    assert [span.state for span in timeline.spans() if span.lane == GENERATOR] == [
        "loading",
        "idle",
        "generating",
        "idle",
    ]
