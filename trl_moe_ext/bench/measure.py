"""Time and peak memory of training steps, each peer in a process of its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Plan:
    """One measurement: shape, peer, dtype and rank, tokens a step, and how many steps to time after two to warm up."""

    shape: str
    peer: str
    dtype: str
    rank: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """Seconds of each timed step, and bytes that the steps needed over the idle model (None where it is unknown)."""

    seconds: list[float]
    extra_bytes: int | None

    @property
    def median(self) -> float:
        """Median seconds of a step."""
        return statistics.median(self.seconds)


def measure_in_process(plan: Plan) -> Measured:
    """Run `measure` in a fresh Python process, so that no peer inherits another's memory or caches.

    Raises:
        subprocess.CalledProcessError: the process failed; what it wrote to stderr has been shown.
    """
    command = [sys.executable, "-m", "trl_moe_ext.bench.measure", json.dumps(asdict(plan))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def measure(plan: Plan) -> Measured:
    """Time forward and backward of random tokens, new ones in every step so that the routing is new as well."""
    from trl_moe_ext.bench.peers import PEERS
    from trl_moe_ext.bench.shapes import SHAPES, VOCABULARY

    implementation, adapt = PEERS[plan.peer]
    model = adapt(SHAPES[plan.shape].build(getattr(torch, plan.dtype), implementation), plan.rank)
    idle = _reset_peak()
    seconds = []
    for step in range(2 + plan.steps):
        tokens = torch.randint(0, VOCABULARY, (1, plan.tokens))
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if step >= 2:
            seconds.append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    peak = _peak()
    return Measured(seconds, None if idle is None or peak is None else peak - idle)


def _reset_peak() -> int | None:
    """Set the kernel's peak of this process to what it holds now, and return that; None where it cannot be done."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _peak()


def _peak() -> int | None:
    """Peak resident bytes since the last reset."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024


if __name__ == "__main__":
    result = measure(Plan(**json.loads(sys.argv[1])))
    print(json.dumps(asdict(result)))
