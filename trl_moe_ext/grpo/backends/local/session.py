"""One life of the local generator as the trainer sees it: its process, the link to it, and whether it is well."""

from __future__ import annotations

import queue
import time
from pathlib import Path
from typing import Final, NoReturn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.backends.errors import (
    BackendDeadError,
    BackendError,
    BackendHungError,
    BackendOutOfMemoryError,
)
from trl_moe_ext.grpo.backends.local.launch import GeneratorProcess
from trl_moe_ext.grpo.backends.local.wire import Failed, Link, Message, Setup, Stop

__all__ = ["Session"]

_ERRORS: Final = {"config": ConfigError, "memory": BackendOutOfMemoryError, "error": BackendError}


class Session:
    """A generator from its start to its end.

    Args:
        module: that its process runs.
        setup: its first message.
        log: what it writes goes there.
    """

    def __init__(self, module: str, setup: Setup, log: Path) -> None:
        self._log = log
        self._over: Failed | None = None
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._process = GeneratorProcess(module, setup.num_threads, log)
        self._link = Link(self._process.connection, self._inbox.put, closed=lambda: self._inbox.put(None))
        self._link.send(setup)

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def send(self, message: Message) -> None:
        """Returns at once."""
        self._link.send(message)

    def receive(self, timeout: float) -> Message | None:
        """The next message; None if there is none in `timeout` seconds.

        Raises:
            BackendError: it said that it can't go on, or it is gone; so does every later call.
            ConfigError: it said that it never will.
        """
        if self._over is not None:
            raise _ERRORS[self._over.kind](self._over.message)
        try:
            message = self._inbox.get(timeout=timeout) if timeout > 0 else self._inbox.get_nowait()
        except queue.Empty:
            # A fork of this process may hold the other end open: then nothing shows that it is gone.
            if self._process.exit_code() is not None:
                self._raise_dead()
            return None
        if message is None:
            self._inbox.put(None)
            self._raise_dead()
        if isinstance(message, Failed):
            self._over = message
            raise _ERRORS[message.kind](message.message)
        return message

    def check_heard(self, stale_after: float, since: float, what: str) -> None:
        """Check that it was heard of in the last `stale_after` seconds.

        Args:
            stale_after: seconds.
            since: monotonic time at which it was given something to do.
            what: it has to do, for the error.

        Raises:
            BackendHungError: it was not.
        """
        silence = time.monotonic() - max(self._link.last_heard, since)
        if silence <= stale_after:
            return
        # If it was this process that stood still, what has arrived meanwhile is being read now.
        time.sleep(min(1.0, stale_after))
        if self._inbox.empty():
            raise BackendHungError(
                f"the generator (pid {self.pid}) has to {what} and has given no sign of life for {silence:.0f} s. If "
                "one step of it may take longer, set a larger heartbeat_stale_after_s"
            )

    def kill(self) -> None:
        """Make it end now, from any thread: who waits for a message is told that it is gone."""
        self._process.kill()

    def close(self, patience: tuple[float, float]) -> None:
        """End it: by asking, by SIGTERM after ``patience[0]`` seconds, by SIGKILL after ``patience[1]`` more."""
        self._link.send(Stop())
        self._process.end(patience)
        self._link.close()

    def _raise_dead(self) -> NoReturn:
        code = self._process.exit_code(timeout=2.0)
        how = {
            None: "closed its connection",
            -9: "was killed (exit code -9), perhaps because the machine ran out of memory",
        }.get(code, f"ended with exit code {code}")
        raise BackendDeadError(
            f"the generator (pid {self.pid}) {how}. The end of {self._log}:\n{self._process.log_tail() or '(empty)'}"
        )
