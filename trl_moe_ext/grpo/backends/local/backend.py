"""The rollout backend `local`: completions from a process of its own on this machine, without a server.

This is the trainer's side; what the process does is in `process` and `engine`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, TypeVar

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.errors import BackendDeadError, BackendError
from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest
from trl_moe_ext.grpo.backends.local.options import check_options, setup_of
from trl_moe_ext.grpo.backends.local.session import Session
from trl_moe_ext.grpo.backends.local.wire import Arrived, Finished, Message, NewAdapter, NewRequests, Ready
from trl_moe_ext.grpo.backends.protocol import BackendContext, RolloutBackend
from trl_moe_ext.router.record_bytes import record_from_bytes

__all__ = ["LocalBackend"]

_Reply = TypeVar("_Reply", bound=Message)


class LocalBackend(RolloutBackend):
    """A generator in a process of its own, on a CPU or a GPU.

    The process ends when its parent does, however that went. Its output is in ``output_dir/rollout/generator.log``.

    An adapter that arrives while completions are being generated draws their next tokens. The keys and values of
    their earlier tokens stay in the cache as the older adapter computed them; the log-probabilities are those that
    each token was really drawn with, so importance weights remain right.

    Raises:
        ConfigError: an option that this backend can't serve.
    """

    module: ClassVar[str] = "trl_moe_ext.grpo.backends.local.process"
    # Reading a large model from a slow disk takes minutes.
    start_timeout_s: ClassVar[float] = 900.0
    # Seconds until an end that was asked for is forced by SIGTERM, and from then on until SIGKILL.
    patience: ClassVar[tuple[float, float]] = (3.0, 2.0)

    def __init__(self, context: BackendContext) -> None:
        check_options(context)
        self._context = context
        self._starts = 0
        self._session: Session | None = None
        self._aborted = threading.Event()
        self._longest_prompt: int | None = None
        self._max_request_tokens = 0
        self._outstanding: set[str] = set()
        self._asked_at = 0.0
        # Completions that arrived while something else was waited for.
        self._early: list[Generation] = []

    @property
    def pid(self) -> int | None:
        session = self._session
        return session.pid if session is not None else None

    def expect_prompts(self, longest: int) -> None:
        """The next start makes a cache for such prompts, and raises a ConfigError if there is no room for it."""
        self._longest_prompt = longest

    def start(self, adapter: AdapterSnapshot) -> None:
        self.stop()
        self._session = self._new_session()
        if self._aborted.is_set():  # before there was anything to kill
            self._session.kill()
        try:
            ready = self._answer(Ready, stale_after=self.start_timeout_s, what="load the model")
            self._max_request_tokens = ready.max_request_tokens
            if self._longest_prompt is not None:
                self._check_fits("the dataset", self._longest_prompt)
            self.load_adapter(adapter)
        except BaseException as error:
            self.stop()
            if self._aborted.is_set() and isinstance(error, BackendError):
                raise BackendDeadError("the start of the generator was aborted") from error
            raise

    def _new_session(self) -> Session:
        args = self._context.args
        setup = setup_of(
            self._context,
            args.seed + self._starts,  # other draws after a restart than before it
            max_requests=args.max_inflight_tasks if self.max_in_flight is None else self.max_in_flight,
            longest_prompt=self._longest_prompt,
        )
        self._starts += 1
        return Session(self.module, setup, Path(self._context.output_dir) / "rollout" / "generator.log")

    def abort(self) -> None:
        self._aborted.set()
        session = self._session
        if session is not None:
            session.kill()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        session = self._running()
        for request in requests:
            self._check_fits(f"request {request.id}", len(request.prompt_ids))
        if not self._outstanding:
            self._asked_at = time.monotonic()
        self._outstanding.update(request.id for request in requests)
        session.send(NewRequests(tuple(requests)))

    def collect(self, timeout: float) -> list[Generation]:
        session = self._running()
        deadline = time.monotonic() + timeout
        found, self._early = self._early, []
        while True:
            try:
                message = session.receive(0.0 if found else deadline - time.monotonic())
            except BackendError:
                if found:
                    return found  # the next call tells
                raise
            if isinstance(message, Finished):
                found.append(self._completed(message))
            elif message is None and (found or time.monotonic() >= deadline):
                break
        if self._outstanding and not found:
            stale_after = self._context.args.heartbeat_stale_after_s
            session.check_heard(stale_after, self._asked_at, f"generate {len(self._outstanding)} completions")
        return found

    def load_adapter(self, adapter: AdapterSnapshot) -> None:
        stale_after = self._context.args.heartbeat_stale_after_s
        damage: str | None = None
        for _ in range(2):
            self._running().send(NewAdapter(adapter.version, adapter.payload, adapter.checksum))
            answer = self._answer(Arrived, stale_after=stale_after, what="load an adapter")
            damage = answer.damage
            if damage is None:
                found, expected = (answer.version, answer.checksum), (adapter.version, adapter.checksum)
                if found != expected:
                    raise BackendError(f"the generator loaded adapter {found} instead of {expected}; start it again")
                return
        raise BackendError(f"the adapter was damaged twice on its way to the generator: {damage}")

    def stop(self) -> None:
        session, self._session = self._session, None
        self._outstanding.clear()
        self._early.clear()
        if session is not None:
            session.close(self.patience)

    def _running(self) -> Session:
        if self._session is None:
            raise BackendError("the generator is not running; call start first")
        return self._session

    def _check_fits(self, what: str, prompt_tokens: int) -> None:
        completion = self._context.sampling.max_completion_length
        needed = prompt_tokens + completion
        if needed > self._max_request_tokens:
            raise ConfigError(
                f"{what}: a prompt of {prompt_tokens} tokens and max_completion_length={completion} need {needed} "
                f"tokens of cache, and there are {self._max_request_tokens}. Leave such prompts out, or set a larger "
                "num_blocks in transformers_continuous_batching_config"
            )

    def _completed(self, message: Finished) -> Generation:
        self._outstanding.discard(message.generation.id)
        if message.routes is None:
            return message.generation
        return replace(message.generation, routes=record_from_bytes(message.routes))

    def _answer(self, kind: type[_Reply], *, stale_after: float, what: str) -> _Reply:
        """The next message of this kind; completions that come before it are kept for `collect`."""
        session, asked_at = self._running(), time.monotonic()
        while True:
            message = session.receive(min(1.0, stale_after))
            if isinstance(message, kind):
                return message
            if isinstance(message, Finished):
                self._early.append(self._completed(message))
            elif message is None:
                session.check_heard(stale_after, asked_at, what)
