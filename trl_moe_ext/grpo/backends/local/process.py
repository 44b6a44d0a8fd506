"""The local generator's process: ``python -m trl_moe_ext.grpo.backends.local.process FD``.

Its main thread takes what comes in, from the trainer and from the engine, one at a time. It knows neither the training
script nor its functions. It ends when the trainer's process does: the connection closes, or another process becomes
its parent, which a fork of the trainer that still holds the connection can't hide.

Heavy imports wait until the signals are set.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_moe_ext.grpo.backends.local.engine import LocalEngine
    from trl_moe_ext.grpo.backends.local.wire import Failed, Link, NewAdapter, Setup

__all__ = ["main"]


def main(make_engine: Callable[..., LocalEngine] | None = None) -> None:
    """Serve until told to stop, or until the trainer's process is gone; never returns.

    Args:
        make_engine: called with the setup and the queue for what the engine has to tell; `LocalEngine` if None.
    """
    # Ctrl-C reaches all processes of the terminal; the trainer decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    try:
        setup = connection.recv()
    except EOFError:
        _leave()
    threading.Thread(target=_watch_parent, args=(setup.parent_pid,), daemon=True).start()

    from trl_moe_ext.grpo.backends.local.wire import Link

    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    link = Link(connection, inbox.put, closed=_leave)
    try:
        _serve(setup, inbox, link, make_engine)
    except BaseException as error:
        traceback.print_exc()
        link.send(_last_words(error))
        link.flush(5.0)
        _leave(1)
    _leave()


def _serve(
    setup: Setup, inbox: queue.SimpleQueue[Any], link: Link, make_engine: Callable[..., LocalEngine] | None
) -> None:
    from trl_moe_ext.grpo.backends.local.engine import LocalEngine
    from trl_moe_ext.grpo.backends.local.wire import Alive, Finished, NewAdapter, NewRequests, Ready, Stop

    engine = (make_engine or LocalEngine)(setup, inbox.put)
    link.send(Ready(engine.max_request_tokens))
    while True:
        try:
            message = inbox.get(timeout=0.5)
        except queue.Empty:
            engine.check()
            continue
        match message:
            case Finished() | Alive():
                link.send(message)
            case NewRequests():
                engine.submit(message.requests)
            case NewAdapter():
                _load(engine, message, link)
            case Exception():
                raise engine.cause(message)
            case Stop():
                return
            case _:
                raise AssertionError(f"unknown message {type(message).__name__}")


def _load(engine: LocalEngine, message: NewAdapter, link: Link) -> None:
    from trl_moe_ext.errors import MoeExtError
    from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
    from trl_moe_ext.grpo.backends.local.wire import Arrived

    try:
        snapshot = AdapterSnapshot.from_payload(message.version, message.payload, message.checksum)
    except MoeExtError as error:
        link.send(Arrived(message.version, message.checksum, damage=str(error)))
        return
    engine.load(snapshot)
    link.send(Arrived(snapshot.version, message.checksum))


def _last_words(error: BaseException) -> Failed:
    import torch

    from trl_moe_ext.errors import ConfigError
    from trl_moe_ext.grpo.backends.local.wire import Failed

    text = f"{type(error).__name__}: {error}"
    # What torch raises for a CPU is a RuntimeError of this text.
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text:
        return Failed("memory", f"the generator ran out of memory: {text}")
    if isinstance(error, ConfigError):
        return Failed("config", str(error))
    return Failed("error", f"the generator failed: {text}")


def _watch_parent(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(1.0)
    _leave()


def _leave(code: int = 0) -> Any:
    """Exit now, whatever other threads do: nothing here has to be put in order."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
