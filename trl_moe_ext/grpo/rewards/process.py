"""A process that runs reward functions, and is killed and replaced when a call takes too long."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rewards.answers import Answer, RewardTimeoutError
from trl_moe_ext.grpo.rewards.runner import Runner
from trl_moe_ext.grpo.rewards.sendable import UNGUARDED, SentFunctions
from trl_moe_ext.grpo.rewards.serving import RAISED, TIMED_OUT, receive, send, serve

__all__ = ["RewardCallError", "RewardProcess"]

# A new process imports the module of the functions, and whatever that needs.
START_TIMEOUT_S = 300.0


class RewardCallError(Exception):
    """A function raised in its process; the message is the traceback there."""


class RewardProcess(Runner):
    """Started at its first call. `run` is for one thread, `close` for any.

    Args:
        functions: what is called, named by position.
        timeout_s: longest that a call may take.
    """

    def __init__(self, functions: SentFunctions, timeout_s: float) -> None:
        self._functions, self._timeout_s = functions, timeout_s
        self._lock = threading.Lock()
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._ended = False
        # Python waits at its end for such processes; what is registered later, as this is, runs before that.
        atexit.register(self.close)

    def run(self, function: int, arguments: Mapping[str, Any]) -> Answer:
        """What the function answers.

        Raises:
            RewardTimeoutError: it took too long; its process was killed, and the next call starts another.
            RewardCallError: it raised, or its process died.
            ConfigError: the process can't load the functions.
        """
        connection = self._started()
        try:
            send(connection, (function, dict(arguments)))
            if not connection.poll(self._timeout_s):
                self._end()
                raise RewardTimeoutError
            answer: tuple[str, Any] = receive(connection)
        except (OSError, EOFError) as error:
            code = self._end()
            raise RewardCallError(f"its process ended with exit code {code}") from error
        kind, value = answer
        if kind == TIMED_OUT:
            raise RewardTimeoutError
        if kind == RAISED:
            raise RewardCallError(value)
        assert isinstance(value, Answer)
        return value

    def close(self) -> None:
        """End the process, whatever it does, for good."""
        atexit.unregister(self.close)
        with self._lock:
            self._ended = True
            self._kill()

    def _kill(self) -> int | None:
        """End the process and what it has started; its exit code. Again it does nothing. The lock is held."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.pid is not None
        if sys.platform != "win32":
            # There is no such group if it has not come to making one, or has ended and left nobody.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        return process.exitcode

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with self._lock:
            if self._ended:
                raise RewardCallError("the pool has been stopped")
            # No daemon, which could have no processes of its own; it is killed in any case.
            process = context.Process(
                target=serve,
                args=(theirs, self._functions.pickled, self._timeout_s),
                name="moe-grpo-reward",
                daemon=False,
            )
            try:
                process.start()
            except RuntimeError as error:  # this process itself is one that imports the script
                raise ConfigError(UNGUARDED) from error
            self._process = process
        theirs.close()
        self._connection = ours
        problem = "it was not ready in time"
        try:
            if ours.poll(START_TIMEOUT_S):
                problem = receive(ours)
        except (OSError, EOFError):
            problem = "it ended at once; what it says stands above"
        if problem:
            self._end()
            if self._ended:
                raise RewardCallError("the pool has been stopped")
            raise ConfigError(
                f"a process for the reward functions {', '.join(self._functions.names)} did not start: "
                f"{problem}. Guard the script by `if __name__ == '__main__':`, or use reward_pool='thread'"
            )
        return ours

    def _end(self) -> int | None:
        """The exit code of the process, which is gone now; None if `close` has been faster."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        with self._lock:
            return self._kill()
