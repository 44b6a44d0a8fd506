"""The environment of the local generator's process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import trl_moe_ext
from trl_moe_ext.grpo.backends.local.launch import _environment


def test_the_process_finds_the_package_and_none_of_its_rooms_as_a_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A room on the path could be taken for a library of its name: ``kernels``, for one."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, *others = _environment(1)["PYTHONPATH"].split(os.pathsep)
    assert first == str(tmp_path), "what the user has set comes first"
    assert [Path(entry, "trl_moe_ext").samefile(Path(trl_moe_ext.__file__).parent) for entry in others] == [True]
