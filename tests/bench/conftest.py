"""The tiny shapes, for every test of the benchmark."""

from __future__ import annotations

import pytest

from tests.bench.tiny import add_tiny_shapes


@pytest.fixture(autouse=True)
def _tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    add_tiny_shapes(monkeypatch)
