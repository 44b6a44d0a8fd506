"""A process that runs reward functions, and is killed and replaced when a call takes too long."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rewards.calls import RewardTimeoutError, call_reward, reward_name

__all__ = ["RewardCallError", "RewardProcess"]

logger = logging.getLogger(__name__)

# A new process imports the module of the functions, and whatever that needs.
START_TIMEOUT_S = 300.0
RETURNED, RAISED, TIMED_OUT = "returned", "raised", "timed out"


class RewardCallError(Exception):
    """A function raised in its process; the message is the traceback there."""


class RewardProcess:
    """Started at its first call. `call` is for one thread, `kill` for any.

    Args:
        functions: what is called, named by position.
        timeout_s: longest that a call may take.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], timeout_s: float) -> None:
        self._functions, self._timeout_s = functions, timeout_s
        self._lock = threading.Lock()
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None
        self._ended = False

    @staticmethod
    def check(functions: Sequence[Callable[..., Any]]) -> None:
        """Raise ConfigError for a function that no other process can have."""
        for function in functions:
            try:
                pickle.dumps(function)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ConfigError(
                    f"reward function {reward_name(function)} can't be sent to a process: {error}. Define it at the "
                    "top of a module, or use reward_pool='thread'"
                ) from error

    def call(self, function: int, arguments: Mapping[str, Any]) -> Any:
        """What the function returns.

        Raises:
            RewardTimeoutError: it took too long; its process was killed, and the next call starts another.
            RewardCallError: it raised, or its process died.
            ConfigError: the process can't load the functions.
        """
        connection = self._started()
        try:
            _send(connection, (function, dict(arguments)))
            if not connection.poll(self._timeout_s):
                self._end()
                raise RewardTimeoutError
            kind, value = _receive(connection)
        except (OSError, EOFError) as error:
            code = self._end()
            raise RewardCallError(f"its process ended with exit code {code}") from error
        if kind == TIMED_OUT:
            raise RewardTimeoutError
        if kind == RAISED:
            raise RewardCallError(value)
        return value

    def kill(self) -> None:
        """End the process, whatever it does, for good."""
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.kill()
                self._process.join()

    def _started(self) -> Connection:
        if self._connection is not None:
            return self._connection
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        with self._lock:
            if self._ended:
                raise RewardCallError("the pool has been stopped")
            functions = pickle.dumps(list(self._functions))
            self._process = context.Process(
                target=_serve, args=(theirs, functions, self._timeout_s), name="moe-grpo-reward", daemon=True
            )
            self._process.start()
        theirs.close()
        self._connection = ours
        problem = "it was not ready in time"
        try:
            if ours.poll(START_TIMEOUT_S):
                problem = _receive(ours)
        except (OSError, EOFError):
            problem = "it ended at once; what it says stands above"
        if problem:
            self._end()
            if self._ended:
                raise RewardCallError("the pool has been stopped")
            raise ConfigError(
                f"a process for the reward functions {', '.join(map(reward_name, self._functions))} did not start: "
                f"{problem}. Guard the script by `if __name__ == '__main__':`, or use reward_pool='thread'"
            )
        return ours

    def _end(self) -> int | None:
        """The exit code of the process, which is gone now."""
        process, connection, self._connection = self._process, self._connection, None
        if connection is not None:
            connection.close()
        with self._lock:
            assert process is not None
            process.kill()
            process.join()
            return process.exitcode


def _send(connection: Connection, message: Any) -> None:
    """Plain bytes: `Connection.send` would share the memory of a tensor, which goes with the process."""
    connection.send_bytes(pickle.dumps(message))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _serve(connection: Connection, pickled: bytes, timeout_s: float) -> None:
    """What the process does, until its parent has gone."""
    # Ctrl-C reaches every process of a terminal; the trainer decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        functions = pickle.loads(pickled)
    except Exception:
        _send(connection, traceback.format_exc())
        return
    _send(connection, None)
    while True:
        try:
            function, arguments = _receive(connection)
        except (EOFError, OSError):
            return
        _send(connection, _answer(functions[function], arguments, timeout_s))


def _answer(function: Callable[..., Any], arguments: Mapping[str, Any], timeout_s: float) -> tuple[str, Any]:
    try:
        returned = call_reward(function, arguments, timeout_s)
        pickle.dumps(returned)
    except RewardTimeoutError:
        return TIMED_OUT, None
    except BaseException:
        return RAISED, traceback.format_exc()
    return RETURNED, returned


def _leave_with_parent() -> None:
    """A function that hangs must not outlive a trainer that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
