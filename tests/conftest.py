"""Settings of every test: reproducible examples, no hub, a fixed seed."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

# Examples are the same in every run; how long one takes depends on the machine, not on the code.
settings.register_profile("reproducible", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
