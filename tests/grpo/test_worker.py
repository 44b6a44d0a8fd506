"""The rollout worker as a trainer sees it: samples, versions, bounds, checkpoints, the end."""

from __future__ import annotations

import json
import multiprocessing
import queue
import threading
import time

import numpy as np
import pytest

from tests.grpo import reward_functions
from tests.grpo.fakes import FakeBackend, Fault, snapshot
from tests.grpo.worker_runs import NUM_GENERATIONS, Trainer, get, make_worker, metrics_of, prompts, wait_until
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.protocol import Generation, Segment
from trl_moe_ext.grpo.rollout.worker import RolloutError, StopRequested
from trl_moe_ext.grpo.timeline import GENERATOR, REWARDS, TRAINER


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    yield
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("moe-grpo")])
    assert not multiprocessing.active_children()


@pytest.fixture
def make(tmp_path):
    workers = []

    def make(*args, **options):
        workers.append(make_worker(tmp_path, *args, **options))
        return workers[-1]

    yield make
    for worker in workers:
        worker.stop()


def test_samples_are_what_was_generated_and_scored(make):
    called_with = []

    def reward(prompts, completions, completion_ids, answer, **kwargs):
        called_with.append((prompts, completions, completion_ids, answer, kwargs))
        return [1.0, 3.0, 1.0, 3.0]

    worker = make(rewards=reward)
    samples = Trainer(worker).step()[:NUM_GENERATIONS]
    asked, texts, token_ids, answers, others = next(c for c in called_with if c[0][0] == samples[0].prompt)
    assert asked == [samples[0].prompt] * NUM_GENERATIONS
    assert answers == [int(samples[0].prompt.split()[1])] * NUM_GENERATIONS
    assert not others
    for sample, text, ids in zip(samples, texts, token_ids, strict=True):
        context = len(sample.prompt) + 1
        np.testing.assert_array_equal(sample.input_ids, [1, *map(ord, sample.prompt), *ids])
        np.testing.assert_array_equal(sample.completion_mask, [0] * context + [1] * 3)
        np.testing.assert_array_equal(sample.old_log_probs, [0] * context + [-1] * 3)
        assert (sample.completion, text) == (text, "".join(map(chr, ids)))
        assert sample.segments == (Segment(1, 3),)
        assert sample.metrics.sample is sample
    assert [sample.advantage for sample in samples] == pytest.approx([-1, 1, -1, 1])
    assert samples[1].metrics == {"reward": 3.0, "reward_std": 1.0, "rewards/reward": 3.0}
    assert len({tuple(sample.input_ids) for sample in samples}) == NUM_GENERATIONS, "each request has its own seed"


def test_completions_of_messages_are_messages(make):
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts[0], completions[0]))
        return [float(index) for index in range(len(completions))]

    messages = [{"role": "user", "content": "hi"}]
    dataset = prompts(4).map(lambda row: {"prompt": messages})
    sample = Trainer(make(rewards=reward, dataset=dataset)).step()[0]
    asked, answered = seen[0]
    assert asked == messages
    assert [sorted(message) for message in answered] == [["content", "role"]]
    assert sample.completion[0]["role"] == "assistant"


def test_every_prompt_is_trained_on_once_an_epoch(make):
    trainer = Trainer(make(rows=10))
    while not {*range(20)} <= {*trainer.trained}:
        trainer.step()
    assert len({*trainer.trained}) == len(trainer.trained)
    prompt_of = {sample.group_id: sample.prompt for sample in trainer.samples}
    assert len({prompt_of[i] for i in range(10)}) == len({prompt_of[i] for i in range(10, 20)}) == 10


def test_no_prompt_is_lost_or_trained_twice_across_a_checkpoint(make):
    first = Trainer(make(FakeBackend(delay=0.01)))
    for _ in range(3):
        first.step()
    get(first.worker)  # of a group that no completed step has trained on
    state = json.loads(json.dumps(first.worker.state()))
    first.worker.stop()
    assert state["num_done"] == 6

    resumed = make()
    resumed.restore(state)
    second = Trainer(resumed, version=7)
    while not {*range(24)} <= {*first.trained, *second.trained}:
        second.step()
    trained = first.trained + second.trained
    assert len({*trained}) == len(trained)
    prompt_of = {sample.group_id: sample.prompt for sample in first.samples + second.samples}
    assert len({prompt_of[i] for i in range(12)}) == 12, "each prompt of the epoch"


@pytest.mark.parametrize("change", [{"rows": 13}, {"seed": 1}])
def test_a_checkpoint_of_other_prompts_is_refused(make, change):
    state = make().state()
    with pytest.raises(ConfigError, match="resume with the dataset and the options"):
        make(**change).restore(state)


def test_a_worker_that_was_stopped_starts_again_where_it_was(make):
    worker = make()
    trainer = Trainer(worker)
    trainer.step()
    worker.stop()
    worker.stop()
    with pytest.raises(RolloutError, match="not running"):
        worker.check_health(60)
    again = Trainer(worker, version=5)
    while not {*range(8)} <= {*trainer.trained, *again.trained}:
        again.step()
    assert not {*trainer.trained} & {*again.trained}


def test_generation_does_not_run_away_from_the_trainer(make):
    backend = FakeBackend()
    worker = make(backend, max_staleness=2, groups_per_step=2, rows=50)
    worker.publish(snapshot(1))
    worker.start()
    limit = (2 + 1) * 2 * NUM_GENERATIONS
    wait_until(lambda: worker.rollout_buffer.qsize() == limit)
    time.sleep(0.2)
    assert len(backend.asked) == limit
    assert backend.most_in_flight <= 16
    worker.publish(snapshot(2))
    wait_until(lambda: worker.rollout_buffer.qsize() == limit + 2 * NUM_GENERATIONS)


def test_the_queue_is_bounded(make):
    worker = make(max_staleness=50, queue_maxsize=10, rows=50)
    worker.publish(snapshot(1))
    worker.start()
    wait_until(lambda: worker.rollout_buffer.qsize() == 8)
    time.sleep(0.2)
    assert worker.rollout_buffer.qsize() == 8
    get(worker)
    time.sleep(0.1)
    assert worker.rollout_buffer.qsize() == 7
    get(worker)
    wait_until(lambda: worker.rollout_buffer.qsize() == 10)


def test_groups_that_got_too_old_are_generated_again(make):
    backend = FakeBackend()
    worker = make(backend, max_staleness=0, groups_per_step=2)
    worker.publish(snapshot(1))
    worker.start()
    wait_until(lambda: worker.rollout_buffer.qsize() == 8)
    worker.publish(snapshot(2))
    wait_until(lambda: 2 in backend.loads)
    samples = [get(worker) for _ in range(8)]
    assert {sample.group_id for sample in samples} <= set(range(4))
    assert {sample.model_version for sample in samples} == {2}
    wait_until(lambda: "0/1/0" in backend.asked)  # the second attempt of group 0
    wait_until(lambda: sum(metrics_of(worker)["rollout/stale_total"]) == 2)


def test_a_trainer_that_prepares_a_batch_ahead_is_not_starved(make):
    worker = make(max_staleness=0, groups_per_step=1, rows=50)
    worker.publish(snapshot(1))
    worker.start()
    assert len([get(worker) for _ in range(3 * NUM_GENERATIONS)]) == 12


def test_a_new_adapter_reaches_what_is_being_generated(make):
    backend = FakeBackend()
    backend.hold = True
    worker = make(backend)
    worker.publish(snapshot(1))
    worker.start()
    wait_until(lambda: backend.asked)
    worker.publish(snapshot(2))
    worker.publish(snapshot(3))
    wait_until(lambda: 3 in backend.loads)
    backend.hold = False
    sample = get(worker)
    assert sample.segments == (Segment(1, 2), Segment(3, 1))
    assert sample.model_version == 1, "the oldest"
    assert backend.loads[-1] == 3


def test_metrics_tell_what_happened(make):
    trainer = Trainer(make(FakeBackend(delay=0.05), num_generations=4))
    for _ in range(3):
        trainer.step()
    time.sleep(0.6)
    trainer.step()
    wait_until(lambda: trainer.worker.metrics_queue.qsize() > 0)
    time.sleep(0.6)
    found = metrics_of(trainer.worker)
    assert sum(tokens for tokens, _ in found["rollout/generated_tok_s"]) >= 3 * 8 * 3
    assert set(found["completions/mean_length"]) == {(3.0, 1.0)}
    assert set(found["completions/clipped_frac"]) == {(0.0, 1.0)}
    assert set(found["sync/bytes"]) == {float(snapshot(2).nbytes)}
    assert all(0 <= seconds < 10 for seconds in found["sync/seconds"] + found["reward/seconds"])
    assert sum(found["rollout/restarts_total"]) == 0
    assert {"rollout/queue_size", "rollout/inflight"} < set(found)
    for name in ("generator/idle_frac", "trainer/wait_frac"):
        shares = [numerator / denominator for numerator, denominator in found[name]]
        assert all(0 <= share <= 1 for share in shares)
        assert max(shares) > 0
    assert sum(lag for lag, _ in found["lag/0"] + found["lag/1"] + found["lag/2"]) == len(trainer.samples)
    timeline = trainer.worker._timeline
    states = {lane: set(timeline.seconds(lane)) for lane in (GENERATOR, REWARDS, TRAINER)}
    assert {"loading", "generating", "idle"} <= states[GENERATOR]
    assert states[REWARDS] <= {"scoring", "idle"}
    assert states[TRAINER] == {"waiting", "training"}


def test_an_idle_worker_takes_no_time_of_a_core(make):
    worker = make()
    worker.publish(snapshot(1))
    worker.start()
    wait_until(lambda: worker.rollout_buffer.qsize() == 3 * 2 * NUM_GENERATIONS)
    began = time.process_time()
    time.sleep(1.5)
    assert time.process_time() - began < 0.02 * 1.5


def test_a_worker_that_waits_for_its_generator_takes_little(make):
    backend = FakeBackend()
    backend.hold = True
    worker = make(backend)
    worker.publish(snapshot(1))
    worker.start()
    wait_until(lambda: backend.asked)
    began = time.process_time()
    time.sleep(1.5)
    assert time.process_time() - began < 0.04 * 1.5


def test_a_request_to_stop_ends_the_wait_of_a_trainer(make):
    backend = FakeBackend()
    backend.hold = True
    worker = make(backend)
    worker.publish(snapshot(1))
    worker.start()
    threading.Timer(0.2, worker.request_stop).start()
    with pytest.raises(StopRequested):
        worker.rollout_buffer.get(timeout=60)


@pytest.mark.parametrize("busy_with", ["generating", "scoring", "waiting for a restart", "starting"])
def test_stop_leaves_nothing_whatever_is_going_on(make, busy_with):
    backend = FakeBackend(delay=0.02)
    leave = threading.Event()
    reached = threading.Event()

    class SlowStart(FakeBackend):
        def start(self, adapter):
            reached.set()
            leave.wait(1.0)
            super().start(adapter)

    def slow_reward(completions, **kwargs):
        reached.set()
        leave.wait(1.0)
        return [0.0] * len(completions)

    if busy_with == "generating":
        backend.hold = True
    elif busy_with == "waiting for a restart":
        backend.faults = [Fault("start", times=5)]
    elif busy_with == "starting":
        backend = SlowStart()
    worker = make(backend, rewards=slow_reward, max_rollout_restarts=50)
    worker.publish(snapshot(1))
    worker.start()
    if busy_with in ("scoring", "starting"):
        assert reached.wait(30)
    else:
        time.sleep(0.3)
    began = time.monotonic()
    worker.stop()
    assert time.monotonic() - began < 10
    assert backend.pid is None
    for _ in range(worker.rollout_buffer.qsize()):
        worker.rollout_buffer.get()
    with pytest.raises(queue.Empty):
        worker.rollout_buffer.get(timeout=0.01)


def test_stop_kills_reward_processes(make):
    dataset = prompts(4)
    worker = make(rewards=reward_functions.hang, reward_pool="process", dataset=dataset, reward_timeout_s=100)
    hangs = FakeBackend(
        complete=lambda request, *_: Generation(request.id, tuple(b"hang"), (0.0,) * 4, (Segment(1, 4),))
    )
    worker._backend = hangs
    worker.publish(snapshot(1))
    worker.start()
    wait_until(multiprocessing.active_children)
    time.sleep(1.0)
    worker.stop()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"token_budget": 8 + 11}, "row 10 has 12 tokens, of which 11 leave room"),
        ({"token_budget": 8}, "leaves no room for a prompt"),
    ],
)
def test_options_that_can_not_work_are_refused_before_anything_starts(make, options, told):
    with pytest.raises(ConfigError, match=told):
        make(**options)


def test_the_backend_is_told_the_longest_prompt_before_anything_starts(make):
    class Small(FakeBackend):
        def expect_prompts(self, longest):
            raise ConfigError(f"no room for {longest} tokens")

    with pytest.raises(ConfigError, match=f"no room for {1 + len('question 10')} tokens"):
        make(Small())


def test_a_worker_needs_an_adapter_and_starts_once(make):
    worker = make()
    with pytest.raises(RolloutError, match="publish one"):
        worker.start()
    worker.publish(snapshot(1))
    worker.start()
    with pytest.raises(RolloutError, match="running already"):
        worker.start()
    with pytest.raises(RolloutError, match="before the start"):
        worker.restore({})
