"""The cores that the generator leaves."""

from __future__ import annotations

import os

import pytest
import torch

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.cpu_threads import share_of_trainer, threads_of_trainer


@pytest.mark.parametrize(
    ("cores", "generator", "processes", "share"),
    [(2, None, 1, 1), (8, None, 1, 4), (8, 6, 1, 2), (8, 8, 1, 1), (1, None, 1, 1), (16, 4, 2, 6)],
)
def test_share(cores, generator, processes, share):
    assert share_of_trainer(cores, generator, processes) == share


def test_a_generator_without_threads_is_refused():
    with pytest.raises(ConfigError, match="rollout_num_threads=0"):
        share_of_trainer(8, 0)


def test_threads_are_given_back(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    torch.set_num_threads(7)
    try:
        with threads_of_trainer(12, 1):
            assert torch.get_num_threads() == 4
        assert torch.get_num_threads() == 7
        with threads_of_trainer(1, 1):
            assert torch.get_num_threads() == 7, "never more than there were"
    finally:
        torch.set_num_threads(before)
