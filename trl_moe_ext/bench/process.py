"""A fresh Python process for each measurement, so that no peer inherits another's memory or caches."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from trl_moe_ext.bench.accuracy import gradient_errors
from trl_moe_ext.bench.measure import Measured, measure
from trl_moe_ext.bench.peers import PeerUnavailableError
from trl_moe_ext.bench.plan import Plan


@dataclass(frozen=True)
class Missing:
    """Why there is no result.

    Attributes:
        reason: one line.
        is_failure: whether it should have worked.
    """

    reason: str
    is_failure: bool = False


def measure_in_process(plan: Plan) -> Measured | Missing:
    """`measure` in a process of its own."""
    result = _run("measure", plan)
    return result if isinstance(result, Missing) else Measured(**result)


def errors_in_process(plan: Plan) -> dict[str, float] | Missing:
    """`gradient_errors` in a process of its own."""
    return _run("errors", plan)


def _run(task: str, plan: Plan) -> dict[str, Any] | Missing:
    return ask_child(__name__, {"task": task, "plan": asdict(plan)})


def ask_child(module: str, job: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any | Missing:
    """The answer of a child process; what it wrote to stderr is shown if it failed.

    Args:
        module: is run with `job` as JSON as its only argument; the last line that it prints is the answer as JSON, or
            says why the job is ``unavailable``.
        job: what it is asked.
        environment: of the child; by default that of this process.
    """
    command = [sys.executable, "-m", module, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return Missing(answer["unavailable"]) if "unavailable" in answer else answer
    sys.stderr.write(f"\n{done.stderr}")
    if done.returncode < 0:
        reason = f"Its process was ended by signal {-done.returncode}; the memory may not have been enough"
    else:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        reason = f"Its process failed: {last[0]}"
    return Missing(reason, is_failure=True)


def perform(task: str, plan: Plan) -> dict[str, Any]:
    """What a child process does: the answer to ``measure`` or ``errors``, or the reason why there is none."""
    tasks: dict[str, Callable[[Plan], dict[str, Any]]] = {
        "measure": lambda plan: asdict(measure(plan)),
        "errors": gradient_errors,
    }
    try:
        return tasks[task](plan)
    except PeerUnavailableError as error:
        return {"unavailable": str(error)}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(perform(job["task"], Plan(**job["plan"]))))
