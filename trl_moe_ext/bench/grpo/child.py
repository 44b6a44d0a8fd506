"""What a child process does: it keeps to its cores before torch counts them, and prints what it measured."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from trl_moe_ext.bench.grpo.plan import Plan


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """The answer to a job of `process.measure_in_process`."""
    plan = Plan(**{**job["plan"], "cores": tuple(job["plan"]["cores"])})
    os.sched_setaffinity(0, plan.cores)
    from trl_moe_ext.bench.grpo.sides import measure

    return asdict(measure(plan, job["output_dir"]))


if __name__ == "__main__":
    print(json.dumps(perform(json.loads(sys.argv[1]))))
