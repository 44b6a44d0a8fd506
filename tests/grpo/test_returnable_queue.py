"""Samples that are put back: they come again, unless their group has become too old and nothing of it was used."""

from __future__ import annotations

import queue

import pytest

from tests.grpo.trainer_runs import make_sample
from trl_moe_ext.grpo.batches.returnable_queue import ReturnableQueue
from trl_moe_ext.grpo.rollout.sample_queue import SampleQueue
from trl_moe_ext.grpo.timeline import Timeline


@pytest.fixture
def dropped() -> list[int]:
    return []


@pytest.fixture
def source(dropped) -> SampleQueue:
    """Two groups of three, of version 0, which is the only one that is not too old."""
    found = SampleQueue(
        max_staleness=0,
        give_back=dropped.append,
        push_metrics=lambda metrics: None,
        timeline=Timeline(),
        wake=lambda: None,
    )
    for group in range(2):
        found.put_group([make_sample([1], [at], [0.0], group_id=group) for at in range(3)])
    return found


def taken(found: ReturnableQueue, count: int) -> list[tuple[int, int]]:
    samples = [found.get(0) for _ in range(count)]
    return [(sample.group_id, int(sample.input_ids[-1])) for sample in samples]


@pytest.mark.parametrize("before", [0, 1, 3, 4])
def test_it_comes_again(source, before):
    found = ReturnableQueue(source, 3)
    assert found.qsize() == 6
    first = taken(found, before)
    found.put_back(found.get(0))
    assert found.qsize() == 6 - before
    assert first + taken(found, 6 - before) == [(group, at) for group in range(2) for at in range(3)]
    with pytest.raises(queue.Empty):
        found.get(0)


def test_an_untouched_group_may_have_become_too_old(source, dropped):
    found = ReturnableQueue(source, 3)
    taken(found, 3)
    found.put_back(found.get(0))
    source.trainer_version = 1
    with pytest.raises(queue.Empty):
        found.get(0)
    assert dropped == [1]


def test_one_that_was_begun_is_used_up(source, dropped):
    found = ReturnableQueue(source, 3)
    taken(found, 4)
    found.put_back(found.get(0))
    source.trainer_version = 1
    assert taken(found, 2) == [(1, 1), (1, 2)]
    assert not dropped
