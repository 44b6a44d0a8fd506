"""`trl-moe` itself: quick, and an error is one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trl_moe_ext import __version__
from trl_moe_ext.cli.main import app
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts import upcycle as upcycle_module

IN_VAIN = ["upcycle", "missing", "out"]


def trl_moe(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = "from trl_moe_ext.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *args], env=os.environ | environment, capture_output=True, text=True
    )


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"trl-moe {__version__}\n")


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("ask", "inspect", "plugins", "report", "upcycle"):
        assert command in result.output


@pytest.mark.parametrize("args", [["--help"], ["upcycle", "--help"], ["plugins", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    program = (
        "import sys\n"
        "from trl_moe_ext.cli.main import app\n"
        "app(standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'pluggy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_error_of_ours_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = trl_moe(*IN_VAIN)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "trl-moe: error: missing is not a directory; give a checkpoint directory with config.json and weights\n"
    )


@pytest.mark.parametrize("flags", [["--debug"], []])
def test_debug_shows_the_traceback(flags: list[str]) -> None:
    environment = {} if flags else {"TRL_MOE_DEBUG": "1"}
    done = trl_moe(*flags, *IN_VAIN, **environment)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("trl_moe_ext.errors.ConfigError: missing is not a directory")


def test_a_message_of_several_lines_becomes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ConfigError("first\n  second")

    monkeypatch.setattr(upcycle_module, "upcycle", fails)
    result = CliRunner().invoke(app, IN_VAIN)
    assert result.stderr == "trl-moe: error: first second\n"


def test_a_bug_is_not_disguised_as_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(upcycle_module, "upcycle", fails)
    assert isinstance(CliRunner().invoke(app, IN_VAIN).exception, ZeroDivisionError)


def test_the_installed_script_runs_main() -> None:
    from importlib.metadata import entry_points

    [script] = entry_points(group="console_scripts", name="trl-moe")
    assert script.value == "trl_moe_ext.cli.main:main"
