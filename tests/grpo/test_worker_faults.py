"""What fails around the trainer, and what the run makes of it: nothing is lost, nothing hangs, nothing is silent."""

from __future__ import annotations

import json
import math
import queue
import signal
import subprocess
import threading
import time

import pytest

from tests.grpo import reward_functions
from tests.grpo.fakes import FakeBackend, Fault, snapshot
from tests.grpo.worker_runs import NUM_GENERATIONS, Trainer, get, make_worker, metrics_of, wait_until
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.protocol import (
    BackendDeadError,
    BackendHungError,
    BackendOutOfMemoryError,
    Generation,
    Segment,
)
from trl_moe_ext.grpo.rollout import back_off, conductor
from trl_moe_ext.grpo.rollout.worker import RolloutError


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(back_off, "MAX_BACK_OFF_S", 0.05)
    workers = []

    def make(*args, **options):
        workers.append(make_worker(tmp_path, *args, **options))
        return workers[-1]

    yield make
    for worker in workers:
        worker.stop()


def told(tmp_path):
    return json.loads((tmp_path / "rollout.json").read_text())


def saying(text):
    """A backend whose completions are `text`; for its bytes as tokens."""
    ids = tuple(text.encode())
    return FakeBackend(
        complete=lambda request, version, _: Generation(
            request.id, ids, (-1.0,) * len(ids), (Segment(version, len(ids)),)
        )
    )


@pytest.mark.parametrize("error", [BackendDeadError, BackendHungError, BackendOutOfMemoryError])
@pytest.mark.parametrize(
    "faults",
    [[("collect", 5), ("collect", 6), ("collect", 23)], [("load_adapter", 1)], [("submit", 2)], [("start", 0)]],
    ids=["mid-generation", "sync", "submit", "start"],
)
def test_no_group_is_lost_or_doubled_when_the_generator_fails(make, tmp_path, error, faults):
    backend = FakeBackend(delay=0.002, faults=[Fault(at, after, error) for at, after in faults])
    trainer = Trainer(make(backend))
    while not {*range(12)} <= {*trainer.trained}:
        trainer.step()
    assert len({*trainer.trained}) == len(trainer.trained)
    wait_until(lambda: told(tmp_path)["state"] == "running" and told(tmp_path)["model_version"] == trainer.version)
    assert told(tmp_path)["restarts"] == len(faults)
    assert told(tmp_path)["pid"] == backend.pid
    time.sleep(0.6)
    trainer.step()
    assert sum(metrics_of(trainer.worker)["rollout/restarts_total"]) == len(faults)
    trainer.worker.stop()
    assert told(tmp_path)["state"] == "stopped"
    assert told(tmp_path)["pid"] is None


def test_samples_that_are_queued_outlive_the_generator(make):
    backend = FakeBackend()
    worker = make(backend, max_rollout_restarts=0)
    worker.publish(snapshot(1))
    worker.start()
    wait_until(lambda: worker.rollout_buffer.qsize() == 24)
    backend.faults.append(Fault("load_adapter"))
    worker.publish(snapshot(2))
    with pytest.raises(RolloutError):
        wait_until(lambda: worker.check_health(60))
    assert [get(worker).group_id for _ in range(24)] == [i for i in range(6) for _ in range(4)]


def test_out_of_memory_halves_the_completions_in_flight(make):
    backend = FakeBackend(delay=0.01, faults=[Fault("collect", 3, BackendOutOfMemoryError)])
    trainer = Trainer(make(backend, max_inflight_tasks=8))
    wait_until(lambda: len(backend.starts) == 2)
    backend.most_in_flight = 0
    trainer.step()
    trainer.step()
    assert backend.most_in_flight == 4


def test_a_generator_that_never_starts_is_given_up_with_its_cause(make, tmp_path):
    worker = make(FakeBackend(faults=[Fault("start", times=100)]), max_rollout_restarts=2)
    worker.publish(snapshot(1))
    worker.start()
    began = time.monotonic()
    with pytest.raises(RolloutError, match="a fault at start") as given_up:
        get(worker, timeout=60)
    assert time.monotonic() - began < 20
    assert isinstance(given_up.value.__cause__.__cause__, BackendDeadError)
    wait_until(lambda: told(tmp_path)["state"] == "failed")
    assert told(tmp_path) == {"pid": None, "backend": "fake", "model_version": None, "restarts": 2, "state": "failed"}


@pytest.mark.parametrize(
    ("complete", "cause"),
    [
        (lambda request, *_: 1 / 0, "division by zero"),
        (lambda request, *_: Generation(request.id, (5, 6), (-1.0,), (Segment(1, 2),)), "2 tokens, 1 log-prob"),
        (lambda request, *_: Generation(request.id, (5, 6), (-1.0, -1.0), (Segment(1, 3),)), "segments of 3 tokens"),
        (lambda request, *_: Generation(request.id, (), (), (Segment(1, 0),)), "one token at least"),
    ],
    ids=["a bug", "log-probabilities", "segments", "empty"],
)
def test_the_thread_never_dies_silently(make, complete, cause):
    worker = make(FakeBackend(complete=complete))
    worker.publish(snapshot(1))
    worker.start()
    noticed = []

    def wait():
        began = time.monotonic()
        try:
            worker.rollout_buffer.get(timeout=60)
        except queue.Empty:
            noticed.append(time.monotonic() - began)

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(30)
    assert noticed, "it is told before the timeout"
    assert noticed[0] < 10
    with pytest.raises(RolloutError, match=cause):
        worker.check_health(60)


def test_options_that_the_backend_refuses_are_not_tried_again(make):
    backend = FakeBackend(faults=[Fault("start", error=ConfigError, times=100)])
    worker = make(backend)
    worker.publish(snapshot(1))
    worker.start()
    with pytest.raises(RolloutError, match="a fault at start") as raised:
        get(worker)
    assert isinstance(raised.value.__cause__, ConfigError)
    assert backend.faults[0].times == 99


def test_a_call_of_the_backend_that_never_comes_back_is_told(make):
    release = threading.Event()

    class Stuck(FakeBackend):
        def submit(self, requests):
            release.wait(60)

    worker = make(Stuck())
    worker.publish(snapshot(1))
    worker.start()
    wait_until(lambda: worker._backend.starts)
    time.sleep(0.4)
    worker.check_health(60)
    with pytest.raises(RolloutError, match="in one call for"):
        worker.check_health(0.1)
    release.set()


def test_a_start_that_takes_long_and_fails_is_no_call_that_hangs(make):
    class Slow(FakeBackend):
        def start(self, adapter):
            time.sleep(0.5)
            raise BackendDeadError("after a long time")

    worker = make(Slow(), max_rollout_restarts=1)
    worker.publish(snapshot(1))
    worker.start()
    with pytest.raises(RolloutError, match="after a long time"):
        wait_until(lambda: worker.check_health(0.1))


def test_stop_aborts_a_start_at_once_and_silently(make, caplog):
    class Loading(FakeBackend):
        aborted = threading.Event()
        begun = threading.Event()

        def start(self, adapter):
            self.begun.set()
            assert self.aborted.wait(60)
            raise BackendDeadError("aborted")

        def abort(self):
            self.aborted.set()

    backend = Loading()
    worker = make(backend)
    worker.publish(snapshot(1))
    worker.start()
    assert backend.begun.wait(30)
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 5
    assert backend.stops
    assert not caplog.text


def test_nothing_is_killed_where_there_is_no_process(make, monkeypatch, caplog):
    monkeypatch.setattr(conductor, "STOP_TIMEOUT_S", 0.5)
    release = threading.Event()

    class Elsewhere(FakeBackend):
        def submit(self, requests):
            self._pid = None
            release.wait(60)

    backend = Elsewhere()
    worker = make(backend)
    worker.publish(snapshot(1))
    worker.start()
    wait_until(lambda: backend.starts and backend.pid is None)
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 0.95, "no second wait for what nothing was done about"
    assert "killed" not in caplog.text
    assert "its thread is left behind" in caplog.text
    release.set()
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("moe-grpo")])


def test_stop_ends_a_call_that_does_not_come_back_by_killing_its_process(make, monkeypatch):
    monkeypatch.setattr(conductor, "STOP_TIMEOUT_S", 0.5)

    class Loading(FakeBackend):
        process = None

        @property
        def pid(self):
            return self.process and self.process.pid

        def start(self, adapter):
            self.process = subprocess.Popen(["sleep", "600"])
            raise BackendDeadError(f"exit code {self.process.wait()}")

    backend = Loading()
    worker = make(backend)
    worker.publish(snapshot(1))
    worker.start()
    wait_until(lambda: backend.process)
    worker.stop()
    assert backend.process.returncode == -signal.SIGKILL
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("moe-grpo")])


def score(make, *functions, num_steps=1, backend=None, **options):
    """Samples of some steps, and all metrics, of a run with these reward functions."""
    # Without running ahead, which for some of these is as far as a run is let go on without any reward.
    trainer = Trainer(make(backend, rewards=list(functions), max_staleness=0, **options))
    samples = [sample for _ in range(num_steps) for sample in trainer.step()]
    metrics = metrics_of(trainer.worker)
    reports = len(metrics["rollout/inflight"])

    def reported():
        for name, values in metrics_of(trainer.worker).items():
            metrics[name] += values
        return len(metrics["rollout/inflight"]) > reports

    wait_until(reported)
    return samples, metrics


def test_a_function_that_raises_for_one_completion_costs_that_one_its_reward(make, caplog):
    def picky(completions, completion_ids, answer, **kwargs):
        assert len(completions) == len(completion_ids) == len(answer)
        if any(ids[0] % 2 for ids in completion_ids):
            raise ValueError("odd")
        return [float(ids[1]) for ids in completion_ids]

    samples, metrics = score(make, picky, skip_zero_advantage=False, num_steps=3)
    for sample in samples:
        first, second = (int(i) for i in sample.input_ids[sample.completion_mask == 1][:2])
        if first % 2:
            assert math.isnan(sample.metrics["reward"])
            assert math.isnan(sample.metrics["rewards/picky"])
            assert sample.advantage == 0
        else:
            assert sample.metrics["reward"] == second
    lost = sum(math.isnan(sample.metrics["reward"]) for sample in samples)
    assert 0 < lost < len(samples)
    assert sum(metrics["reward/raised_total"]) >= lost
    assert caplog.text.count("reward function picky raised ValueError: odd") == 1


def test_the_rewards_of_other_functions_are_kept(make):
    def broken(**kwargs):
        raise ValueError("never")

    def fine(completions, **kwargs):
        return [0.0, 1.0, 0.0, 1.0]

    samples, metrics = score(make, broken, fine)
    assert [sample.advantage for sample in samples[:4]] == pytest.approx([-1, 1, -1, 1])
    assert sum(metrics["reward/raised_total"]) % NUM_GENERATIONS == 0
    assert math.isnan(samples[0].metrics["rewards/broken"])


@pytest.mark.parametrize(
    ("returned", "lost"),
    [([1.0, None, 2.0, 3.0], 1), ([1.0, math.nan, 2.0, math.inf], 2), ([1.0, 2.0], 4), (None, 4)],
    ids=["None", "not finite", "too few", "nothing"],
)
def test_answers_that_are_no_rewards_are_counted(make, caplog, returned, lost):
    samples, metrics = score(make, lambda **kwargs: returned, skip_zero_advantage=False)
    assert sum(math.isnan(sample.metrics["reward"]) for sample in samples[:NUM_GENERATIONS]) == lost
    assert all(sample.advantage == 0 for sample in samples if math.isnan(sample.metrics["reward"]))
    assert sum(metrics["reward/invalid_total"]) >= 2 * lost
    assert caplog.text.count("reward function <lambda> returned") == 1


@pytest.mark.parametrize("pool", ["thread", "process"])
def test_a_function_that_hangs_costs_its_group_the_reward_and_not_the_run(make, caplog, pool):
    release = threading.Event()

    def hang(completions, **kwargs):
        release.wait(60)
        return [1.0] * len(completions)

    function = hang if pool == "thread" else reward_functions.hang
    samples, metrics = score(
        make, function, backend=saying("hang"), reward_pool=pool, reward_timeout_s=0.3, skip_zero_advantage=False
    )
    release.set()
    assert all(math.isnan(sample.metrics["rewards/hang"]) for sample in samples)
    assert sum(metrics["reward/timeout_total"]) >= len(samples)
    assert "reward function hang took longer than reward_timeout_s=0.3 s" in caplog.text


def test_a_process_that_can_not_be_started_ends_the_run_with_the_reason(make):
    class Unloadable:
        __name__ = "unloadable"

        def __reduce__(self):
            return (int, ("not a number",))

        def __call__(self, **kwargs):
            return []

    worker = make(rewards=Unloadable(), reward_pool="process")
    worker.publish(snapshot(1))
    worker.start()
    with pytest.raises(RolloutError, match="unloadable did not start"):
        get(worker, timeout=60)


def test_groups_without_an_advantage_are_replaced(make):
    def sometimes(answer, **kwargs):
        return [1.0, 2.0, 3.0, 4.0] if answer[0] % 3 == 0 else [1.0] * 4

    worker = make(rewards=sometimes)
    trainer = Trainer(worker)
    for _ in range(4):
        trainer.step()
    assert all(int(sample.prompt.split()[1]) % 3 == 0 for sample in trainer.samples)
    assert all(sample.metrics["reward_std"] > 0 for sample in trainer.samples)
    assert not worker.skipped_groups() & {*trainer.trained}
    first_open = worker.state()["first_undone"]
    assert {*range(first_open)} <= worker.skipped_groups() | {*trainer.trained}
    time.sleep(0.6)
    trainer.step()
    metrics = metrics_of(worker)
    assert sum(metrics["rollout/zero_advantage_total"]) >= 4
    # Of every group, those that were left out too: they had equal rewards, which is no reason not to count them.
    groups = sum(count for _, count in metrics["rollout/reward"]) / NUM_GENERATIONS
    assert groups >= len(trainer.trained) + len(worker.skipped_groups())


def test_a_trainer_is_not_starved_by_rewards_that_are_all_the_same(make, caplog):
    worker = make(rewards=lambda **kwargs: [0.0] * 4, groups_per_step=2)
    trainer = Trainer(worker)
    samples = trainer.step()
    trainer.step()
    assert all(sample.advantage == 0 for sample in samples)
    assert worker.skipped_groups() == {*range(4 * 2)}, "four steps' worth, then they are handed on"
    assert caplog.text.count("of 9 groups in a row, 9 had the same reward") == 1
    assert "and 0 no reward at all" in caplog.text


@pytest.mark.parametrize("skip", [True, False])
def test_a_run_without_any_reward_ends_with_the_reason(make, skip):
    def broken(**kwargs):
        raise ImportError("install what checks the answers")

    trainer = Trainer(make(rewards=broken, skip_zero_advantage=skip, groups_per_step=1), groups_per_step=1)
    told = r"of the first 4 groups.*broken raised ImportError: install what"
    with pytest.raises(RolloutError, match=told) as ended:
        wait_until(lambda: not trainer.step())
    assert len(trainer.trained) <= 4
    assert isinstance(ended.value.__cause__.__cause__, ImportError)


def test_a_run_that_has_had_a_reward_goes_on_without(make, caplog):
    calls = []

    def first_only(completions, **kwargs):
        calls.append(1)
        return [1.0, 2.0, 3.0, 4.0] if len(calls) == 1 else [None] * len(completions)

    trainer = Trainer(make(rewards=first_only, groups_per_step=1), groups_per_step=1)
    for _ in range(8):
        trainer.step()
    trainer.worker.check_health(60)
    assert "of 5 groups in a row, 0 had the same reward for all of their completions, and 5 no reward" in caplog.text


def test_a_function_that_yields_and_raises_costs_one_completion_its_reward(make, caplog):
    def each(completions, **kwargs):
        for completion in completions:
            yield 1.0 / (ord(completion[0]) % 2) + ord(completion[1])

    samples, _ = score(make, each, num_steps=2)
    assert any(math.isnan(sample.metrics["reward"]) for sample in samples)
    assert any(sample.advantage for sample in samples)
    assert "reward function each raised ZeroDivisionError" in caplog.text
