"""SIGTERM and Ctrl-C while training: the step is finished, or the wait for samples ended, and a checkpoint written.

A second signal stops at once, as if the handlers had never been there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

from trl_moe_ext.grpo.rollout.sample_queue import StopRequested

__all__ = ["Interruption"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Takes the two signals while it is entered; only in the main thread, elsewhere it does nothing.

    Args:
        end_wait: called at the first signal, by its handler; makes a wait for samples raise `StopRequested`.

    Attributes:
        signal: the first one that came, or None.
    """

    def __init__(self, end_wait: Callable[[], None]) -> None:
        self.signal: int | None = None
        self._end_wait = end_wait
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.signal = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `StopRequested` if a signal has come: before samples are taken that would not be trained on."""
        if self.signal is not None:
            raise StopRequested

    def take_over(self) -> None:
        """End as if the signal that another process had was this one's."""
        self.signal = self.signal or signal.SIGTERM

    def end_process(self) -> None:
        """Raise what a program raises that is ended by the signal; nothing happens if none came.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: for SIGTERM, with the exit code that shells give to it, 143.
        """
        if self.signal is not None:
            raise _ending(self.signal)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self._restore()
            raise _ending(number)
        self.signal = number
        name = signal.Signals(number).name
        # Not by `print` or `logging`, whose own work the signal may have interrupted.
        os.write(2, f"\n{name}: stopping after this step, with a checkpoint; once more to stop at once\n".encode())
        self._end_wait()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}


def _ending(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
