"""`trl-moe report`: where it reads, where it writes, and how each failure ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.reporting.sample_run import write_run
from trl_moe_ext.cli.main import app


def report(*args: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, args)], catch_exceptions=False)


def error_of(*args: object) -> str:
    result = report(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    return result.stderr


def write_checkpoint(directory: Path) -> Path:
    directory.mkdir(parents=True)
    state = {"log_history": [{"step": 5, "loss": 1.5}], "max_steps": 20, "global_step": 5}
    (directory / "trainer_state.json").write_text(json.dumps(state))
    return directory


def test_the_page_is_beside_the_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    result = report(run)
    assert (result.exit_code, result.output) == (0, f"Report: {run / 'report.html'}\n")
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_or_where_it_is_wanted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    report(run, "--out", tmp_path / "page.html")
    assert "<title>run " in (tmp_path / "page.html").read_text()
    assert not (run / "report.html").exists()


def test_an_old_page_is_replaced(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "report.html").write_text("old")
    report(run)
    assert (run / "report.html").read_text() != "old"


def test_a_checkpoint_makes_a_shorter_page_and_says_so(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "run" / "checkpoint-5")
    result = report(checkpoint)
    assert result.exit_code == 0
    assert "trainer_state.json" in result.stderr
    assert "trl-moe report" not in result.stderr
    page = (checkpoint / "report.html").read_text()
    assert "run, checkpoint-5" in page
    assert "Step 5 of 20" in page
    write_run(tmp_path / "run")
    assert f"trl-moe report {tmp_path / 'run'}" in report(checkpoint).stderr


@pytest.mark.parametrize("files", [[], ["adapter_config.json", "notes.txt"]])
def test_a_directory_without_a_run_says_what_it_holds_and_how_to_get_one(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).touch()
    message = error_of(tmp_path)
    assert f"{tmp_path} has no moe_run.json" in message
    assert (", ".join(files) if files else "is empty") in message
    assert "--peft_type moe_lora" in message
    assert "RunRecordCallback" in message


def test_checkpoints_without_a_record_are_named(tmp_path: Path) -> None:
    for step in (90, 100, 5):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    assert f"trl-moe report {tmp_path / 'checkpoint-100'}" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["moe_run.json", "trainer_state.json", "router_history.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (write_run(tmp_path) / "moe_run.json").rename(tmp_path / "trainer_state.json")
    (tmp_path / name).write_text('{"log_history": 3}')
    assert f"{tmp_path / name} is" in error_of(tmp_path)


def test_places_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "is not a directory; give the output_dir" in error_of(tmp_path / "missing")
    assert "is a directory; give the name of a file" in error_of(run, "--out", tmp_path)
    assert "cannot be written: No such file or directory" in error_of(run, "--out", tmp_path / "no" / "page.html")


def test_it_needs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    program = (
        "import sys\n"
        "from trl_moe_ext.cli.main import app\n"
        f"app(['report', {str(run)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
