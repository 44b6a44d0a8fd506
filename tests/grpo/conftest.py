"""The hosts' own notes on tiny runs on a CPU, each by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.grpo.trainer_runs import HOSTS_NOTES

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            for note in HOSTS_NOTES:
                item.add_marker(pytest.mark.filterwarnings(note))
