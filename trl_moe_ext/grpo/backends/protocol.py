"""What a rollout backend is: it generates completions with the adapter that it was last given.

A backend knows nothing of prompts as text, groups, rewards or training: it is asked for completions of token ids and
hands back token ids with the log-probabilities that they were drawn with. All calls but `abort` come from one thread.
A backend that fails is started again by its caller, which also asks again for what it had not finished: a backend
keeps no promises beyond its own life, and never restarts itself.

All that a plug-in needs is named here: what is asked for and given is in `generation`, what is raised in `errors`.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.errors import (
    BackendDeadError,
    BackendError,
    BackendHungError,
    BackendOutOfMemoryError,
)
from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest, Sampling, Segment

if TYPE_CHECKING:
    from peft import PeftConfig

    from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig

__all__ = [
    "BackendContext",
    "BackendDeadError",
    "BackendError",
    "BackendHungError",
    "BackendOutOfMemoryError",
    "Generation",
    "GenerationRequest",
    "RegisteredBackend",
    "RolloutBackend",
    "Sampling",
    "Segment",
]


@dataclass(frozen=True)
class BackendContext:
    """What a backend is made from.

    Attributes:
        model_path: folder or Hub id of the base model that is trained.
        model_init_kwargs: of `from_pretrained`, with `dtype`, for a generator that computes as the trainer does.
        peft_config: of the adapter that is trained.
        args: all options of the run.
        output_dir: of the run; a backend's files go below ``output_dir/rollout``.
        record_routes: whether `Generation.routes` is wanted.
    """

    model_path: str
    model_init_kwargs: dict[str, Any]
    peft_config: PeftConfig
    sampling: Sampling
    args: AsyncMoeGRPOConfig
    output_dir: str
    record_routes: bool = False
    pad_token_id: int | None = None


class RolloutBackend(ABC):
    """Generates completions.

    All methods are called from one thread, but `abort`, and `pid`, which any thread may read.

    Attributes:
        max_in_flight: completions that it will be asked for at a time; set before a start, and lowered before one that
            follows a lack of memory. None for `max_inflight_tasks` of the options.
    """

    max_in_flight: int | None = None

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """Of the process that generates; None before `start`, after `stop`, and for a server somewhere else."""

    def expect_prompts(self, longest: int) -> None:  # noqa: B027 - a backend may take prompts of any length
        """Called before `start`: the longest prompt has so many tokens.

        Raises:
            ConfigError: that, and a completion, are more than it can ever hold.
        """

    @abstractmethod
    def start(self, adapter: AdapterSnapshot) -> None:
        """Start, or start afresh whatever the state: returns when it can generate with `adapter`.

        Raises:
            BackendError: it did not start; it has left nothing running.
            ConfigError: it never will, with these options.
        """

    @abstractmethod
    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Ask for completions; returns at once.

        Raises:
            BackendError: it can't go on.
        """

    @abstractmethod
    def collect(self, timeout: float) -> list[Generation]:
        """What has been finished since the last call, waiting at most `timeout` seconds for the first; maybe nothing.

        Raises:
            BackendError: it can't go on, hung included: this call is where a backend tells so.
        """

    @abstractmethod
    def load_adapter(self, adapter: AdapterSnapshot) -> None:
        """Generate with `adapter` from now on; returns when its arrival is verified and it is in use.

        What is being generated is not lost: it goes on with the new adapter, with a segment each, or ends with the
        old one.

        Raises:
            BackendError: it can't go on.
        """

    def abort(self) -> None:
        """Called from any thread, for good: a `start` that is under way in another one fails soon.

        `stop` is still called afterwards, from the thread of the other calls.
        """
        pid = self.pid
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @abstractmethod
    def stop(self) -> None:
        """Leave no process and no file handle behind; again it does nothing. Never raises for a backend that died."""


@dataclass(frozen=True)
class RegisteredBackend:
    """A rollout backend as a plug-in offers it.

    Attributes:
        name: what `rollout_backend` names.
        description: one line for `trl-moe plugins`.
        make: makes the backend, without starting it; raises ConfigError for options that it can't serve.
        records_routes: whether it can fill `Generation.routes`.
    """

    name: str
    description: str
    make: Callable[[BackendContext], RolloutBackend]
    records_routes: bool = False
