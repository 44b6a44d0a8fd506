"""`trl-moe plugins`: all that the host knows, uncut."""

from __future__ import annotations

import importlib.metadata
import json
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from trl_moe_ext import __version__
from trl_moe_ext.cli.main import app
from trl_moe_ext.plugins import host

LONG_NAME = "a_plug_in_with_a_name_that_is_longer_than_any_terminal_is_wide_" * 3
REASON = "[red] No module named 'something_with_a_long_name' in a place that has a long name too, " * 3


def broken() -> object:
    raise ImportError(REASON)


@pytest.fixture
def one_broken_plug_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entry_point = SimpleNamespace(name=LONG_NAME, dist=SimpleNamespace(name="a-dist", version="0.9"), load=broken)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [entry_point])
    host.cache_clear()
    yield
    host.cache_clear()


def output_of(*args: str) -> str:
    with warnings.catch_warnings():
        # What the warning would say is in the output.
        warnings.simplefilter("error")
        result = CliRunner().invoke(app, ["plugins", *args], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.mark.usefixtures("one_broken_plug_in")
def test_a_pipe_gets_one_whole_line_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    [row] = [line.strip() for line in output_of().splitlines() if "a-dist" in line]
    assert row.split(None, 4) == [LONG_NAME, "a-dist", "0.9", "-", f"error; ImportError: {REASON}".strip()]


def test_the_builtin_kernels_are_listed_with_their_description() -> None:
    rows = [line.split(None, 3) for line in output_of().splitlines()]
    assert ["builtin_kernels", "trl_moe_ext", __version__, "register_kernels", "ok"] in [
        line.split() for line in output_of().splitlines()
    ]
    [reference] = [row for row in rows if row[1:2] == ["reference"]]
    assert reference[2] == "builtin_kernels"
    assert len(reference[3].split()) > 3


@pytest.mark.usefixtures("one_broken_plug_in")
def test_json() -> None:
    builtin, *_, other = json.loads(output_of("--json"))
    assert builtin["name"] == "builtin_kernels"
    assert builtin["status"] == "ok"
    assert "grouped" in builtin["records"]["register_kernels"]
    assert other == {
        "name": LONG_NAME,
        "distribution": "a-dist",
        "version": "0.9",
        "builtin": False,
        "hooks": [],
        "records": {},
        "errors": [f"ImportError: {REASON}"],
        "status": "error",
    }
