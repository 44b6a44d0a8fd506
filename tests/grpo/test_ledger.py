"""Which groups are done: none is lost, and none done twice, in whatever order things happen."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rollout.ledger import Ledger, Ticket


def take(ledger, count):
    return [ledger.take().group_id for _ in range(count)]


def test_ids_are_handed_out_in_order():
    assert take(Ledger(), 4) == [0, 1, 2, 3]


def test_what_is_given_back_comes_first_as_another_attempt():
    ledger = Ledger()
    take(ledger, 4)
    ledger.give_back(2)
    ledger.give_back(1)
    assert [ledger.take() for _ in range(3)] == [Ticket(1, attempt=1), Ticket(2, attempt=1), Ticket(4)]
    ledger.give_back(1)
    assert ledger.take() == Ticket(1, attempt=2)


def test_a_checkpoint_keeps_what_is_done_and_forgets_what_is_under_way():
    ledger = Ledger()
    take(ledger, 6)
    ledger.finish([0, 1, 4])
    ledger.skip(3)
    state = ledger.state()
    assert state == {"first_undone": 2, "done_beyond": [3, 4]}
    resumed = Ledger()
    resumed.restore(json.loads(json.dumps(state)))
    assert resumed.num_done() == 4
    assert take(resumed, 4) == [2, 5, 6, 7]


def test_admitted_counts_what_the_trainer_gets():
    ledger = Ledger()
    take(ledger, 5)
    ledger.skip(0)
    ledger.give_back(1)
    ledger.finish([2])
    assert ledger.admitted == 3
    assert ledger.skipped() == {0}


def test_a_group_of_two_steps_is_finished_once():
    ledger = Ledger()
    take(ledger, 2)
    ledger.finish([0])
    ledger.finish([0, 1])
    assert ledger.num_done() == 2


@pytest.mark.parametrize(
    "state",
    [{}, {"first_undone": 3}, {"first_undone": "x", "done_beyond": []}, {"first_undone": 3, "done_beyond": [2]}],
)
def test_a_damaged_checkpoint_is_refused(state):
    with pytest.raises(ConfigError, match="another checkpoint"):
        Ledger().restore(state)


@given(st.lists(st.tuples(st.sampled_from(["take", "give_back", "skip", "finish", "resume"]), st.integers(0, 9))))
def test_no_id_is_lost_or_done_twice(actions):
    ledger, under_way, done = Ledger(), [], []
    for action, choice in actions:
        if action == "take":
            undone = next(i for i in range(1000) if i not in done and i not in under_way)
            assert ledger.take().group_id == undone, "the lowest id that is neither done nor under way"
            under_way.append(undone)
        elif action == "resume":
            state = ledger.state()
            ledger = Ledger()
            ledger.restore(state)
            assert ledger.state() == state
            under_way = []
        elif under_way:
            group_id = under_way.pop(choice % len(under_way))
            if action == "give_back":
                ledger.give_back(group_id)
                continue
            assert group_id not in done
            done.append(group_id)
            ledger.skip(group_id) if action == "skip" else ledger.finish([group_id])
        assert ledger.num_done() == len(done)
    state = ledger.state()
    assert sorted(done) == [*range(state["first_undone"]), *state["done_beyond"]]
