"""A side in a fresh process, on the cores that it may use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from trl_moe_ext.bench.grpo.clock import Measured
from trl_moe_ext.bench.grpo.plan import Plan
from trl_moe_ext.bench.process import Missing, ask_child

__all__ = ["Keep", "measure_in_process"]

Keep = Callable[[Path], object]

_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def measure_in_process(plan: Plan, keep: Keep | None = None) -> Measured | Missing:
    """`sides.measure` in a process of its own, without a GPU.

    Args:
        plan: of one side.
        keep: is given the output directory of the run before that is removed.
    """
    threads = dict.fromkeys(_THREADS, str(len(plan.cores)))
    environment = {**os.environ, **_QUIET, **threads, "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(prefix="trl-moe-bench-") as directory:
        job = {"plan": asdict(plan), "output_dir": directory}
        answer = ask_child("trl_moe_ext.bench.grpo.child", job, environment)
        if isinstance(answer, Missing):
            return answer
        if keep is not None:
            keep(Path(directory))
    return Measured(**answer)
