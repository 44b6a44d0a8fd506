"""What every run here has: the hosts' own notes on a tiny run on a CPU, each by name, and no pictures."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from trl_moe_ext.sft import artefacts

_HERE = Path(__file__).parent
_HOSTS_NOTES = [
    "ignore:`(is_)?gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning",
    "ignore:.*pin_memory.*:UserWarning",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            for note in _HOSTS_NOTES:
                item.add_marker(pytest.mark.filterwarnings(note))


@pytest.fixture(autouse=True, scope="session")
def _libraries_are_no_garbage() -> Iterator[None]:
    """Each `train` collects garbage, which would search all that the hosts have loaded: most of the time of a run."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a tiny run; `test_artefacts` is about the pictures."""
    if request.module.__name__ != "tests.sft.test_artefacts":
        for draw in ("save_heatmap", "save_max_vio_curve"):
            monkeypatch.setattr(artefacts, draw, lambda history, path: False)
