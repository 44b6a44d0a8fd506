"""What a process of reward functions does, and how the one that started it talks with it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

from trl_moe_ext.grpo.rewards.answers import RewardTimeoutError
from trl_moe_ext.grpo.rewards.calls import call_reward
from trl_moe_ext.grpo.rewards.event_loop import EventLoop

__all__ = ["RAISED", "RETURNED", "TIMED_OUT", "receive", "send", "serve"]

# The first of the two items of each answer.
RETURNED, RAISED, TIMED_OUT = "returned", "raised", "timed out"


def send(connection: Connection, message: Any) -> None:
    """Plain bytes: `Connection.send` would share the memory of a tensor, which goes with the process."""
    connection.send_bytes(pickle.dumps(message))


def receive(connection: Connection) -> Any:
    """What the other side has sent; EOFError if it is gone."""
    return pickle.loads(connection.recv_bytes())


def serve(connection: Connection, pickled: bytes, timeout_s: float) -> None:
    """What the process does, until its parent has gone."""
    if sys.platform != "win32":
        os.setsid()  # a group of its own, to be killed as a whole
    # Ctrl-C reaches every process of a terminal; the trainer decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        functions = pickle.loads(pickled)
    except Exception:
        send(connection, traceback.format_exc())
        return
    send(connection, None)
    loop = EventLoop()
    while True:
        try:
            function, arguments = receive(connection)
        except (EOFError, OSError):
            return
        send(connection, _answer(functions[function], arguments, loop, timeout_s))


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
