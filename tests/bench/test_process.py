"""What a child process answers, and how its end reaches the user."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.tiny import plan, stay_in_this_process
from trl_moe_ext.bench.fit import sizes_of
from trl_moe_ext.bench.measure import Measured
from trl_moe_ext.bench.plan import ACCURACY_TOKENS, Plan, Request
from trl_moe_ext.bench.process import Missing, errors_in_process, measure_in_process
from trl_moe_ext.bench.run import run


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that stands in the place of Python."""
    script = tmp_path / "python"
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def test_the_answer_is_the_last_line(python: Path) -> None:
    python.write_text("""#!/bin/sh\necho noise\necho '{"seconds": [0.5, 0.25, 1.0], "extra_bytes": 7}'\n""")
    measured = measure_in_process(plan())
    assert measured == Measured([0.5, 0.25, 1.0], 7)
    assert measured.median == 0.5


def test_the_job_reaches_the_child(python: Path) -> None:
    python.write_text("""#!/bin/sh\necho "{\\"unavailable\\": \\"$1 $2\\"}"; echo "$3" > "$0.job"\n""")
    assert errors_in_process(plan(rank=7)) == Missing("-m trl_moe_ext.bench.process")
    job = Path(f"{python}.job").read_text()
    assert '"task": "errors"' in job
    assert '"rank": 7' in job


def test_an_error_is_one_line_and_the_rest_is_shown(python: Path, capsys: pytest.CaptureFixture[str]) -> None:
    python.write_text("#!/bin/sh\necho 'Traceback' >&2; echo 'RuntimeError: no memory' >&2; exit 1\n")
    assert measure_in_process(plan()) == Missing("Its process failed: RuntimeError: no memory", is_failure=True)
    assert capsys.readouterr().err == "\nTraceback\nRuntimeError: no memory\n"


def test_a_child_that_says_nothing(python: Path) -> None:
    python.write_text("#!/bin/sh\nexit 3\n")
    assert measure_in_process(plan()) == Missing("Its process failed: exit status 3", is_failure=True)


def test_a_child_that_is_killed(python: Path) -> None:
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    found = measure_in_process(plan())
    assert isinstance(found, Missing)
    assert found.is_failure
    assert f"signal {signal.SIGKILL:d}" in found.reason


def request(**changes: Any) -> Request:
    asked = Request("experts", "tiny-qwen3", ("frozen", "moe_lora"), (8, 16), "float32", 4, 2, 1, "cpu")
    return replace(asked, **changes)


def test_rounds_are_interleaved() -> None:
    seen: list[Plan] = []
    said: list[str] = []

    def measure(asked: Plan) -> Measured:
        seen.append(asked)
        return Measured([0.001 * len(seen)], 2_000_000)

    def errors(asked: Plan) -> dict[str, float]:
        seen.append(asked)
        return {"dX": 0.5}

    asked = request()
    results = run(asked, sizes_of(asked), said.append, measure, errors)
    once = [("frozen", 8), ("moe_lora", 8), ("frozen", 16), ("moe_lora", 16)]
    assert [(p.peer, p.tokens) for p in seen] == [*once, *once, *((p, ACCURACY_TOKENS) for p in asked.peers)]
    assert [len(row.rounds) for row in results.rows] == [2, 2, 2, 2]
    assert results.errors == {"frozen": {"dX": 0.5}, "moe_lora": {"dX": 0.5}}
    lines = "".join(said).splitlines()
    assert lines[0] == "round 1 of 2, 8 tokens, frozen: 1.00 ms, 2.00 MB"
    assert lines[-1] == f"errors of gradients, {ACCURACY_TOKENS} tokens, moe_lora: done"


def test_a_peer_that_is_missing_is_not_asked_again() -> None:
    asked_for: list[str] = []

    def measure(asked: Plan) -> Measured | Missing:
        asked_for.append(asked.peer)
        return Missing("No.") if asked.peer == "frozen" else Measured([0.1], None)

    asked = request(tokens=(8,))
    results = run(asked, sizes_of(asked), lambda _: None, measure, lambda _: {})
    assert asked_for == ["frozen", "moe_lora", "moe_lora"]
    assert [row.missing for row in results.rows] == [Missing("No."), None]
    assert results.errors.keys() == {"moe_lora"}


def test_a_layer_has_no_errors_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_in_this_process(monkeypatch)
    asked = request(kind="layer", source="tiny-llama4", peers=("frozen", "peft_grouped_mm"), tokens=(8,), rounds=1)
    results = run(asked, sizes_of(asked), lambda _: None)
    frozen, theirs = results.rows
    assert len(frozen.rounds) == 1
    assert theirs.missing is not None
    assert not theirs.missing.is_failure
    assert results.errors == {}
