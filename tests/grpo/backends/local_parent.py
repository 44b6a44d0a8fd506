"""A trainer's process that is to be killed: it starts a generator, forks, and tells the generator's pid.

The fork inherits the connection to the generator and lives on, so the connection stays open.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests.grpo.backends.local_runs import ask, context, trainer_model, zero_snapshot
from trl_moe_ext.grpo.backends.local.backend import LocalBackend

if __name__ == "__main__":
    path, folder = sys.argv[1:]
    backend = LocalBackend(context(path, Path(folder), max_completion_length=100_000))
    backend.start(zero_snapshot(trainer_model(path)))
    ask(backend, 2)
    fork = os.fork()
    if fork:
        print(backend.pid, fork, flush=True)
    time.sleep(600)
