"""Micro-batches: none is taken before it is asked for, none is too large, no sample is lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.grpo.batches import micro_batches
from trl_moe_ext.grpo.batches.micro_batches import MicroBatches, TokenBudgetPlanner
from trl_moe_ext.grpo.rollout.sample_queue import StopRequested

BUDGET = 12


def sample(group: int, length: int, tag: int = 0) -> dict[str, Any]:
    """Of a prompt of one token, which its group shares."""
    ids = np.array([group, *range(100 * tag, 100 * tag + length - 1)])
    mask = np.arange(length) > 0
    return {"input_ids": ids, "completion_mask": mask, "group_id": group, "tag": tag}


class Source:
    """Samples that can be put back."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._left = deque(samples)
        self.put_back = self._left.appendleft

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self._left:
            yield self._left.popleft()

    def __len__(self) -> int:
        return len(self._left)


def plan(samples: list[dict[str, Any]], num_rows: int, token_budget: int, max_samples: int) -> TokenBudgetPlanner:
    source = Source(samples)
    return TokenBudgetPlanner(source, num_rows, token_budget, max_samples, source.put_back)


@given(
    lengths=st.lists(st.integers(2, BUDGET + 3), min_size=1, max_size=12),
    num_rows=st.integers(1, 3),
    spare=st.integers(0, 3),
)
def test_every_sample_comes_once_and_rows_keep_to_the_budget(lengths, num_rows, spare):
    samples = [sample(at // 3, length, at) for at, length in enumerate(lengths)]
    planned = [*plan(samples, num_rows, BUDGET, num_rows + spare)]
    given_out = [entry["tag"] for rows in planned for row in rows for entry in row.samples]
    assert sorted(given_out) == [*range(len(given_out))], "in the order of the queue"
    # What does not fill a micro-batch waits for more.
    assert len(lengths) - len(given_out) < num_rows + spare
    for rows in planned:
        assert all(row.samples for row in rows)
        assert sum(len(row.samples) for row in rows) <= num_rows + spare
        for row in rows:
            assert len(row.tokens) <= BUDGET or len(row.samples) == 1


def test_a_micro_batch_is_complete_with_its_last_sample():
    """No sample more has to be there: the next one may only be generated after the next version."""

    def samples():
        for at in range(4):
            yield sample(0, 3, at)
        raise AssertionError("a fifth sample was asked for")

    planner = iter(TokenBudgetPlanner(samples(), 1, 100, 2, pytest.fail))
    assert [len(next(planner)[0].samples) for _ in range(2)] == [2, 2]


def test_what_does_not_fit_is_not_kept():
    """A step may end there, and the next one wants to know how old the sample is by then."""
    source = Source([sample(0, 7, 0), sample(1, 7, 1)])
    planner = iter(TokenBudgetPlanner(source, 1, BUDGET, 4, source.put_back))
    assert [entry["tag"] for entry in next(planner)[0].samples] == [0]
    assert len(source) == 1


def test_a_group_stays_together_where_it_fits():
    rows = next(iter(plan([sample(g, 3, t) for t, g in enumerate([0, 1, 0, 1])], 2, 20, 4)))
    assert [sorted(row.groups) for row in rows] == [[0], [1]]


def batches(plan: Any, check: Any = lambda: None, accelerator: Any = None) -> tuple[MicroBatches, list[Any]]:
    taken: list[Any] = []
    accelerator = accelerator or Accelerator(cpu=True)
    return MicroBatches(accelerator, plan, lambda examples: {"rows": examples[0]}, check, taken.append), taken


def test_one_at_a_time():
    asked = []

    def plan():
        for number in range(3):
            asked.append(number)
            yield [number]

    found, taken = batches(plan())
    stream = iter(found)
    assert next(stream) == {"rows": [0]}
    assert (asked, taken) == ([0], [[0]])


def test_the_check_comes_first():
    def stop():
        raise StopRequested

    found, taken = batches(iter([[0]]), check=stop)
    with pytest.raises(StopRequested):
        next(iter(found))
    assert not taken


class _TwoProcesses:
    """What a process of two sees of the others: everything that the main process sends."""

    num_processes = 2

    def __init__(self, index: int) -> None:
        self.process_index, self.is_main_process = index, index == 0


def test_each_process_has_its_row(monkeypatch):
    sent = []
    monkeypatch.setattr(
        micro_batches, "broadcast_object_list", lambda found, from_process: sent.append(found) or found
    )
    main, _ = batches(iter([["a", "b"]]), accelerator=_TwoProcesses(0))
    assert next(iter(main)) == {"rows": ["a"]}
    monkeypatch.setattr(micro_batches, "broadcast_object_list", lambda found, from_process: sent[0])
    assert next(iter(batches(None, accelerator=_TwoProcesses(1))[0])) == {"rows": ["b"]}


@pytest.mark.parametrize(
    ("error", "told"),
    [(StopRequested(), StopRequested), (MoeExtError("gone"), MoeExtError), (KeyError("bug"), RuntimeError)],
    ids=["a signal", "no more samples", "a bug"],
)
def test_all_processes_end_together(monkeypatch, error, told):
    def plan():
        raise error
        yield

    sent = []
    monkeypatch.setattr(
        micro_batches, "broadcast_object_list", lambda found, from_process: sent.append(found) or found
    )
    with pytest.raises(type(error)):
        next(iter(batches(plan(), accelerator=_TwoProcesses(0))[0]))
    monkeypatch.setattr(micro_batches, "broadcast_object_list", lambda found, from_process: sent[0])
    with pytest.raises(told):
        next(iter(batches(None, accelerator=_TwoProcesses(1))[0]))
