"""Options that can't be served, or would do nothing, are refused by name."""

from __future__ import annotations

import pytest

from tests.grpo.trainer_runs import HOSTS_NOTES, settings
from trl_moe_ext.errors import ConfigError

pytestmark = [pytest.mark.filterwarnings(note) for note in HOSTS_NOTES]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_pool": "proces"}, "reward_pool='proces' is unknown; did you mean process"),
        ({"importance_correction": "None"}, "importance_correction='None' is unknown.*none"),
        ({"importance_level": "word"}, "importance_level='word' is unknown"),
        ({"epsilon_high": 0.28}, "epsilon_high=0.28: nothing is clipped"),
        ({"importance_correction": "none", "importance_cap": 2.0}, "importance_cap=2.0 has no effect"),
        ({"importance_correction": "tis", "importance_floor": 0.5}, "floor=0.5 has no effect with mode='tis'"),
        ({"weight_sync_steps": 0}, "weight_sync_steps=0 should be more than 0"),
        ({"queue_maxsize": -1}, "queue_maxsize=-1 should be 0 or more"),
        ({"reward_timeout_s": 0}, "reward_timeout_s=0 should be more than 0"),
        ({"max_inflight_tasks": 0}, "max_inflight_tasks=0 generates nothing; use 1 or more, or -1"),
        ({"max_staleness": -1}, "max_staleness=-1 should be 0 or more"),
        ({"num_generations": 1}, "use 2 or more"),
        ({"auto_find_batch_size": True}, "set per_device_train_batch_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **options)


def test_clipping_is_an_option_of_the_loss_that_clips(tmp_path):
    assert settings(tmp_path, importance_correction="none", epsilon_high=0.28).correction is None
