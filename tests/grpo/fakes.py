"""A rollout backend, a tokenizer and a dataset in memory, for tests of what is around them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.protocol import (
    BackendDeadError,
    Generation,
    GenerationRequest,
    RolloutBackend,
    Segment,
)

# Larger than any process id of Linux, whose limit is 2 ** 22.
_PIDS = itertools.count(2**22 + 1)


@dataclass
class Fault:
    """The backend fails once.

    Attributes:
        at: the method that raises.
        after: calls of that method that go well before; for ``collect`` completions that were finished before.
        times: how often it happens.
    """

    at: str
    after: int = 0
    error: Callable[[str], Exception] = BackendDeadError
    times: int = 1


class FakeBackend(RolloutBackend):
    """Finishes each completion `delay` seconds after it was asked for, unless a fault comes between.

    Args:
        complete: makes a completion, from its request, the version when it was asked for, and the one now.

    Attributes:
        hold: as long as it is True, nothing is finished.
        starts: version of the adapter of each start.
        loads: version of each adapter that was loaded.
        asked: id of each request, as often as it was asked for.
        most_in_flight: completions that were asked for and not finished, at the most.
    """

    def __init__(
        self,
        delay: float = 0.0,
        faults: Sequence[Fault] = (),
        num_tokens: int = 3,
        complete: Callable[[GenerationRequest, int, int], Generation] | None = None,
    ) -> None:
        self.delay, self.faults, self.num_tokens = delay, list(faults), num_tokens
        self._complete = complete or self._default_complete
        self._pid: int | None = None
        self._version = -1
        self._under_way: dict[str, tuple[float, int, GenerationRequest]] = {}
        self._calls: dict[str, int] = {"start": 0, "submit": 0, "collect": 0, "load_adapter": 0}
        self.hold = False
        self.starts: list[int] = []
        self.loads: list[int] = []
        self.asked: list[str] = []
        self.most_in_flight = 0
        self.stops = 0

    @property
    def pid(self) -> int | None:
        return self._pid

    def start(self, adapter: AdapterSnapshot) -> None:
        self._under_way.clear()
        self._fail_if_due("start")
        self._pid, self._version = next(_PIDS), adapter.version
        self.starts.append(adapter.version)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        self._fail_if_due("submit")
        self.asked += [request.id for request in requests]
        due = time.monotonic() + self.delay
        self._under_way.update((request.id, (due, self._version, request)) for request in requests)
        self.most_in_flight = max(self.most_in_flight, len(self._under_way))

    def collect(self, timeout: float) -> list[Generation]:
        until = time.monotonic() + timeout
        first = min((due for due, _, _ in self._under_way.values()), default=until)
        time.sleep(max(0.0, (until if self.hold else min(first, until)) - time.monotonic()))
        finished = []
        for id, (due, version, request) in list(self._under_way.items()):
            if self.hold or due > time.monotonic() or self._due("collect"):
                break
            del self._under_way[id]
            finished.append(self._complete(request, version, self._version))
            self._calls["collect"] += 1
        if not finished and self._under_way:
            self._raise_if_due("collect")
        return finished

    def load_adapter(self, adapter: AdapterSnapshot) -> None:
        self._fail_if_due("load_adapter")
        self._version = adapter.version
        self.loads.append(adapter.version)

    def stop(self) -> None:
        self._under_way.clear()
        self._pid = None
        self.stops += 1

    def _due(self, method: str) -> Fault | None:
        return next((f for f in self.faults if f.at == method and f.times and self._calls[method] >= f.after), None)

    def _raise_if_due(self, method: str) -> None:
        if fault := self._due(method):
            fault.times -= 1
            raise fault.error(f"a fault at {method}")

    def _fail_if_due(self, method: str) -> None:
        self._raise_if_due(method)
        self._calls[method] += 1

    def _default_complete(self, request: GenerationRequest, asked_version: int, version: int) -> Generation:
        count = self.num_tokens
        tokens = tuple(97 + (request.seed >> 5 * i) % 26 for i in range(count))
        if asked_version == version or count == 1:
            segments: tuple[Segment, ...] = (Segment(asked_version, count),)
        else:
            segments = (Segment(asked_version, count - 1), Segment(version, 1))
        return Generation(request.id, tokens, (-1.0,) * count, segments)


class FakeTokenizer:
    """A token of each character; a conversation is ``<role>content`` of each message."""

    eos_token_id = 0
    model_max_length = int(1e30)

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in token_ids if i > 1 or not skip_special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        assert not tokenize
        extra = "".join(f"[{name}={value}]" for name, value in kwargs.items())
        text = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        return extra + text + "<assistant>" * add_generation_prompt


def snapshot(version: int) -> AdapterSnapshot:
    """An adapter that is its version."""
    return AdapterSnapshot(version, {"weight": torch.tensor([float(version)])})
