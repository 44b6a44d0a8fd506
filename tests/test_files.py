"""A file is whole or as it was."""

from __future__ import annotations

import os

import pytest

from trl_moe_ext.files import write_atomically


def test_a_file_is_written_and_replaced(tmp_path):
    for text in ("first", "second, with \N{GREEK SMALL LETTER ALPHA}"):
        write_atomically(tmp_path / "file.json", text)
        assert (tmp_path / "file.json").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file.json", "old")

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "file.json", "new")
    assert (tmp_path / "file.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
