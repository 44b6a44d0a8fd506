"""Where reward functions run: a bounded number of calls at a time, none of which can hold up the others for long.

A thread can't be killed: one that hangs is abandoned, and another takes its place. A process can.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from trl_moe_ext.grpo.rewards.answers import Answer, RewardTimeoutError
from trl_moe_ext.grpo.rewards.event_loop import EventLoop
from trl_moe_ext.grpo.rewards.process import RewardProcess
from trl_moe_ext.grpo.rewards.runner import InThread, Runner
from trl_moe_ext.grpo.rewards.sendable import SentFunctions

__all__ = ["RewardPool"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    function: int
    arguments: Mapping[str, Any]
    future: Future[Answer] = field(default_factory=Future)


@dataclass(eq=False)
class _Worker:
    """A thread of the pool; `call` and `began` are of what it is doing, `abandoned` when nobody waits for it."""

    runner: Runner
    thread: threading.Thread | None = None
    call: _Call | None = None
    began: float = 0.0
    abandoned: bool = False


class RewardPool:
    """Runs calls of reward functions in threads of this process, or in processes of their own.

    Args:
        functions: what is called, named by position.
        kind: ``thread``, or ``process``, for functions that can be pickled.
        concurrency: calls at the same time; those that hang and were abandoned are not counted.
        timeout_s: longest that a call may take; time in the queue is not counted.
        on_done: called from a thread of the pool, or from `expire`, after each call.

    Raises:
        ConfigError: `kind` is ``process``, and a function can't be pickled.
    """

    def __init__(
        self,
        functions: Sequence[Callable[..., Any]],
        *,
        kind: str,
        concurrency: int,
        timeout_s: float,
        on_done: Callable[[], None],
    ) -> None:
        self._loop = EventLoop()
        self._make_runner: Callable[[], Runner] = lambda: InThread(functions, self._loop, timeout_s)
        if kind == "process":
            sent = SentFunctions.of(functions)
            self._make_runner = lambda: RewardProcess(sent, timeout_s)
        # A process is killed by the thread that waits for it; this limit is for where that can't be done.
        self._timeout_s = timeout_s if kind == "thread" else float("inf")
        self._concurrency, self._on_done = concurrency, on_done
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._unfinished = 0
        self._stopped = False

    def submit(self, function: int, arguments: Mapping[str, Any]) -> Future[Answer]:
        """Call function number `function`; the future has its answer, what it raises, or a RewardTimeoutError."""
        call = _Call(function, arguments)
        with self._lock:
            assert not self._stopped, "a call for a pool that has been stopped"
            self._unfinished += 1
            self._calls.put(call)
            self._hire()
        return call.future

    def expire(self) -> None:
        """Give up calls that take too long. To be called now and then: nothing else watches threads that hang."""
        now = time.monotonic()
        with self._lock:
            # With their calls: a worker may finish its call, and forget it, as soon as the lock is free.
            late = [(w, w.call) for w in self._workers if w.call is not None and now - w.began > self._timeout_s]
            for worker, _ in late:
                worker.abandoned = True
                self._workers.remove(worker)
                self._unfinished -= 1
            self._hire(len(late))
        for _, call in late:
            call.future.set_exception(RewardTimeoutError())
            self._on_done()

    def stop(self, grace_s: float = 5.0) -> None:
        """End all calls and threads; calls that have not begun are cancelled. Again it does nothing.

        Args:
            grace_s: how long threads in a call are waited for; then they are left to themselves.
        """
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            workers = list(self._workers)
        self._cancel_waiting()
        self._loop.stop()
        for worker in workers:
            self._calls.put(None)
            worker.runner.close()
        deadline = time.monotonic() + grace_s
        for worker in workers:
            assert worker.thread is not None
            worker.thread.join(max(0.0, deadline - time.monotonic()))
        left = sum(worker.thread is not None and worker.thread.is_alive() for worker in workers)
        if left:
            logger.warning(
                "%d calls of reward functions still run %g s after the end of training; their threads are left "
                "behind. reward_pool='process' runs functions that can be ended",
                left,
                grace_s,
            )

    def _cancel_waiting(self) -> None:
        try:
            while True:
                call = self._calls.get_nowait()
                assert call is not None
                call.future.cancel()
        except queue.Empty:
            pass

    def _hire(self, at_most: int = 1) -> None:
        for _ in range(min(at_most, self._concurrency - len(self._workers), self._unfinished - len(self._workers))):
            worker = _Worker(self._make_runner())
            worker.thread = threading.Thread(target=self._work, args=(worker,), name="moe-grpo-reward", daemon=True)
            self._workers.append(worker)
            worker.thread.start()

    def _work(self, worker: _Worker) -> None:
        try:
            while self._work_once(worker):
                pass
        finally:
            worker.runner.close()

    def _work_once(self, worker: _Worker) -> bool:
        """One call; False when there will be no other."""
        call = self._calls.get()
        if call is None:
            return False
        with self._lock:
            worker.call, worker.began = call, time.monotonic()
        error = None
        try:
            answer = worker.runner.run(call.function, call.arguments)
        except BaseException as raised:  # SystemExit of a user's function included: it is the call's, not ours
            error = raised
        with self._lock:
            worker.call = None
            if worker.abandoned:
                return False  # the future has its timeout already
            self._unfinished -= 1
        if error is None:
            call.future.set_result(answer)
        else:
            call.future.set_exception(error)
        self._on_done()
        return not self._stopped
