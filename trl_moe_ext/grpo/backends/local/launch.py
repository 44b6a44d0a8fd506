"""Start the local generator's process, with the environment, the threads and the device that it should have."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trl_moe_ext.grpo.cpu_threads import cores

if TYPE_CHECKING:
    from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig

__all__ = ["GeneratorProcess", "generator_device", "generator_threads"]

# Variables of the launchers of distributed training: the generator is no rank.
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_OF_LAUNCHERS_BEGIN = ("ACCELERATE_", "FSDP_", "ROLE_", "TORCHELASTIC_")
_OF_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# The folder above the package, however deep in it this module is.
_PACKAGE_HOME = str(Path(__file__).parents[__name__.count(".")])


class GeneratorProcess:
    """A process of its own, not forked: nothing of the trainer's process is in it, not even its `__main__`.

    Args:
        module: run as ``python -m module``.
        num_threads: that it computes with.
        log: what it writes to stdout and stderr is appended to this file.

    Attributes:
        connection: to it, for messages in both directions.
    """

    def __init__(self, module: str, num_threads: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._log_start = log, log.stat().st_size if log.exists() else 0
        self._socket, theirs = socket.socketpair()
        # -P: not with the working directory first on the module path, where a random.py would hide Python's.
        command = [sys.executable, "-P", "-m", module, str(theirs.fileno())]
        with theirs, log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(num_threads),
                pass_fds=[theirs.fileno()],
            )
        self.connection = Connection(os.dup(self._socket.fileno()))

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self, timeout: float = 0.0) -> int | None:
        """Of the process; negative for a signal, None if it still runs after `timeout` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        return self._process.returncode

    def log_tail(self, max_bytes: int = 2000) -> str:
        """The end of what it has written."""
        with self._log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_start, end - max_bytes))
            return file.read().decode(errors="replace").strip()

    def kill(self) -> None:
        """Make it end now; from any thread, and also when it has ended. `end` is still needed."""
        self._process.kill()

    def end(self, patience: tuple[float, float]) -> None:
        """See that it ends: by itself in ``patience[0]`` seconds, by SIGTERM in ``patience[1]`` more, by SIGKILL."""
        for seconds, number in zip(patience, (signal.SIGTERM, signal.SIGKILL)):
            if self.exit_code(seconds) is None:
                self._process.send_signal(number)
        self._process.wait()
        # Wakes whoever reads or writes, also when a fork of the trainer has inherited the other end.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def generator_threads(args: AsyncMoeGRPOConfig) -> int:
    """Threads of a generator on a CPU: as many as asked for, else half of the cores that this process may use."""
    if args.rollout_num_threads is not None:
        return args.rollout_num_threads
    return max(1, cores() // 2)


def generator_device(args: AsyncMoeGRPOConfig) -> str:
    """Device of the generator: the one asked for, else the first GPU without a rank, else that of the trainer."""
    if args.rollout_device != "auto":
        return args.rollout_device
    if args.use_cpu:
        return "cpu"
    if torch.cuda.is_available():
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if ranks_here < torch.cuda.device_count():
            return f"cuda:{ranks_here}"
    return str(args.device)


def _environment(num_threads: int) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_LAUNCHERS and not name.startswith(_OF_LAUNCHERS_BEGIN)
    }
    path = [entry for entry in kept.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return (
        kept
        | dict.fromkeys(_OF_THREADS, str(num_threads))
        # The package may have been found through the script's own folder. At the end, it hides nothing.
        | {"PYTHONPATH": os.pathsep.join([*path, _PACKAGE_HOME])}
    )
