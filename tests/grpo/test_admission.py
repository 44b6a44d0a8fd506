"""How far generation runs ahead: so far that no sample gets too old, and no less."""

from __future__ import annotations

import pytest

from trl_moe_ext.grpo.rollout.admission import Admission


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_a_group_is_begun_if_it_will_be_young_enough_when_its_turn_comes(max_staleness):
    groups_per_version = 3
    admission = Admission(max_staleness, groups_per_version)
    for version in range(4):
        for position in range(40):  # of the group among those that are trained on
            lag_when_trained = position // groups_per_version - version
            assert admission.allows(position, version) == (lag_when_trained <= max_staleness)


def test_a_trainer_that_looks_further_ahead_is_not_starved():
    admission = Admission(max_staleness=0, groups_per_version=2)
    assert not admission.allows(2, 0)
    admission.starved()
    assert admission.allows(2, 0)
    assert not admission.allows(3, 0)
    assert admission.allows(4, 1), "it looks as far ahead at the next version"
