"""A process that runs reward functions, and is killed and replaced when a call takes too long."""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.rewards.answers import Answer, RewardTimeoutError
from trl_moe_ext.grpo.rewards.calls import call_reward, reward_name
from trl_moe_ext.grpo.rewards.event_loop import EventLoop

__all__ = ["RewardCallError", "RewardProcess", "check_main_is_guarded"]

# A new process imports the module of the functions, and whatever that needs.
START_TIMEOUT_S = 300.0
UNGUARDED = (
    "the script would train again in each process that it starts, because such a process imports it: guard the script "
    "by `if __name__ == \"__main__\":`, or use reward_pool='thread'"
)
RETURNED, RAISED, TIMED_OUT = "returned", "raised", "timed out"


class RewardCallError(Exception):
    """A function raised in its process; the message is the traceback there."""


def check_main_is_guarded() -> None:
    """Raise ConfigError in a process that runs the user's script only to import it, as those of rewards do first."""
    # What multiprocessing itself asks before it starts a process.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigError(UNGUARDED)


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
        # Python waits at its end for such processes; what is registered later, as this is, runs before that.
        atexit.register(self.kill)

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

    def call(self, function: int, arguments: Mapping[str, Any]) -> Answer:
        """What the function answers.

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
            answer: tuple[str, Any] = _receive(connection)
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

    def kill(self) -> None:
        """End the process, whatever it does, for good."""
        atexit.unregister(self.kill)
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
            functions = pickle.dumps(list(self._functions))
            # No daemon, which could have no processes of its own; it is killed in any case.
            process = context.Process(
                target=_serve, args=(theirs, functions, self._timeout_s), name="moe-grpo-reward", daemon=False
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
        """The exit code of the process, which is gone now; None if `kill` has been faster."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        with self._lock:
            return self._kill()


def _send(connection: Connection, message: Any) -> None:
    """Plain bytes: `Connection.send` would share the memory of a tensor, which goes with the process."""
    connection.send_bytes(pickle.dumps(message))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _serve(connection: Connection, pickled: bytes, timeout_s: float) -> None:
    """What the process does, until its parent has gone."""
    if sys.platform != "win32":
        os.setsid()  # a group of its own, to be killed as a whole
    # Ctrl-C reaches every process of a terminal; the trainer decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        functions = pickle.loads(pickled)
    except Exception:
        _send(connection, traceback.format_exc())
        return
    _send(connection, None)
    loop = EventLoop()
    while True:
        try:
            function, arguments = _receive(connection)
        except (EOFError, OSError):
            return
        _send(connection, _answer(functions[function], arguments, loop, timeout_s))


def _answer(
    function: Callable[..., Any], arguments: Mapping[str, Any], loop: EventLoop, timeout_s: float
) -> tuple[str, Any]:
    try:
        return RETURNED, call_reward(function, arguments, loop, timeout_s)
    except RewardTimeoutError:
        return TIMED_OUT, None
    except BaseException:
        return RAISED, traceback.format_exc()


def _leave_with_parent() -> None:
    """A function that hangs must not outlive a trainer that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        if sys.platform != "win32":
            os.killpg(0, signal.SIGKILL)  # with what the function has started
        os._exit(1)
