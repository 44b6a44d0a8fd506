"""What the trainer's process and the local generator say to each other, and the link that carries it.

Messages are pickled: both ends are the same program on the same machine, and the connection is inherited, so nobody
else can speak on it.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest, Sampling

__all__ = [
    "Alive",
    "Arrived",
    "Failed",
    "Finished",
    "Link",
    "Message",
    "NewAdapter",
    "NewRequests",
    "Ready",
    "Setup",
    "Stop",
]


@dataclass(frozen=True)
class Setup:
    """The first message to the generator.

    Attributes:
        peft_config: pickled by itself: its class can be found only when PEFT knows all adapter types.
        prompt_tokens: that the cache holds of each prompt.
        max_requests: completions that are asked for at the same time.
        cache: options of transformers' `ContinuousBatchingConfig` that the user has set.
        parent_pid: of the trainer's process.
    """

    model_path: str
    model_init_kwargs: dict[str, Any]
    peft_config: bytes
    sampling: Sampling
    prompt_tokens: int
    max_requests: int
    cache: dict[str, Any]
    seed: int
    device: str
    num_threads: int
    record_routes: bool
    pad_token_id: int | None
    parent_pid: int


@dataclass(frozen=True)
class NewAdapter:
    """To the generator: the adapter to draw with from now on; answered by `Arrived`."""

    version: int
    payload: bytes
    checksum: str


@dataclass(frozen=True)
class NewRequests:
    """To the generator: completions that are asked for."""

    requests: tuple[GenerationRequest, ...]


@dataclass(frozen=True)
class Stop:
    """To the generator: exit now."""


@dataclass(frozen=True)
class Ready:
    """From the generator: the model is loaded; it now needs an adapter.

    Attributes:
        max_request_tokens: of prompt and completion, that the cache holds of one request.
    """

    max_request_tokens: int


@dataclass(frozen=True)
class Arrived:
    """From the generator: an adapter arrived.

    Attributes:
        checksum: as it was sent.
        damage: why it could not be read; the adapter before it is still in use. None if it is in use.
    """

    version: int
    checksum: str
    damage: str | None = None


@dataclass(frozen=True)
class Alive:
    """From the generator, at most twice a second: it has generated tokens of so many completions."""

    active: int


@dataclass(frozen=True)
class Finished:
    """From the generator: one completion, its routes as `record_to_bytes` packs them."""

    generation: Generation
    routes: bytes | None


@dataclass(frozen=True)
class Failed:
    """From the generator: its last words."""

    kind: Literal["config", "memory", "error"]
    message: str


Message = Setup | NewAdapter | NewRequests | Stop | Ready | Arrived | Alive | Finished | Failed


class Link:
    """One end of the connection, with a thread that reads and one that writes.

    Neither end may ever wait for the other to read: a generator that hangs would take the trainer with it.

    Args:
        connection: owned by the link from now on.
        deliver: called with every message, from the thread that reads.
        closed: called at the end, from the same thread: the other end is gone.

    Attributes:
        last_heard: monotonic time of the last message.
    """

    def __init__(self, connection: Connection, deliver: Callable[[Message], None], closed: Callable[[], None]) -> None:
        self.last_heard = time.monotonic()
        self._connection = connection
        self._deliver, self._closed = deliver, closed
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="rollout-reader", daemon=True)
        self._writer = threading.Thread(target=self._write, name="rollout-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def send(self, message: Message) -> None:
        """Returns at once; whether it arrives, `closed` and answers tell.

        Raises:
            Exception: whatever pickle raises for a message that can't be sent.
        """
        self._outbox.put(pickle.dumps(message))  # here, where the caller hears of it

    def flush(self, timeout: float) -> None:
        """Wait until all is written, for at most `timeout` seconds; nothing can be sent afterwards."""
        self._outbox.put(None)
        self._writer.join(timeout)

    def close(self) -> None:
        """Release the threads and the connection, once the other end is gone or the connection shut down."""
        self._outbox.put(None)
        for thread in (self._reader, self._writer):
            thread.join()
        self._connection.close()

    def _read(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                self.last_heard = time.monotonic()
                self._deliver(message)
        except (EOFError, OSError):
            pass  # this is how the end of the other process shows, however it came
        finally:
            self._closed()

    def _write(self) -> None:
        while (data := self._outbox.get()) is not None:
            try:
                self._connection.send_bytes(data)
            except OSError:
                return  # nobody reads any more: `closed` is called
