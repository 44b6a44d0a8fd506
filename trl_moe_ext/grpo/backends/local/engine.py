"""What generates in the local generator's process: transformers' continuous batching, watched and interrupted.

The library runs the model in a thread of its own. `_put` and `_after_forward` are called in that thread, everything
else in the main one. While the library is paused its thread stands still, so an adapter can be exchanged, and what has
been drawn with the old one can be counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import GenerationOutput

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest
from trl_moe_ext.grpo.backends.local.batching import make_manager
from trl_moe_ext.grpo.backends.local.draft import Draft
from trl_moe_ext.grpo.backends.local.model import AdaptedModel
from trl_moe_ext.grpo.backends.local.wire import Alive, Finished, Setup
from trl_moe_ext.router.record import RoutingRecord
from trl_moe_ext.router.record_bytes import record_to_bytes
from trl_moe_ext.router.recorder import RoutingRecorder
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.trace import RouterTrace

__all__ = ["LocalEngine"]

HEARTBEAT_S = 0.5


class LocalEngine:
    """Generates completions with the adapter that it was last given.

    Args:
        setup: what to generate with, and how.
        tell: called with `Finished`, `Alive` and errors, from another thread.

    Attributes:
        max_request_tokens: of prompt and completion, that the cache holds of one request.
    """

    def __init__(self, setup: Setup, tell: Callable[[Finished | Alive | Exception], None]) -> None:
        torch.set_num_threads(setup.num_threads)
        self._tell = tell
        self._version = -1
        self._drafts: dict[str, Draft] = {}
        self._last_beat = 0.0
        self._model = AdaptedModel(setup)
        model = self._model.language_model
        self._trace: RouterTrace | None = None
        if setup.record_routes:
            self._record_routes()
        self._manager = make_manager(setup, model)
        self._manager.output_router.output_queue = self  # see `put`
        model.register_forward_hook(self._after_forward)
        self._manager.warmup()
        self.max_request_tokens = infer_max_single_request_tokens(self._manager.batch_processor.cache)
        self._manager.start()

    def load(self, adapter: AdapterSnapshot) -> None:
        """Generate with `adapter` from the next token on, also what is under way; its older tokens stay in the cache.

        Raises:
            ConfigError: it is of another model.
        """
        with self._manager.pause():
            self._model.put(adapter)
            scheduler = self._manager.batch_processor.scheduler
            begun = scheduler.waiting_requests | scheduler.active_requests
            for request_id, draft in self._drafts.items():
                drawn = len(begun[request_id].logprobs) if request_id in begun else 0
                draft.switch(adapter.version, drawn)
            self._version = adapter.version

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Begin to generate these completions."""
        for request in requests:
            self._drafts[request.id] = Draft(len(request.prompt_ids), self._version)
            if self._manager.add_request(list(request.prompt_ids), request.id) is None:
                self.check()

    def check(self) -> None:
        """Raise what has ended the library's thread, if it has ended."""
        status = self._manager.background_thread_status
        if status.fatal_error is not None:
            raise status.fatal_error
        if not self._manager.is_running():
            raise RuntimeError("the thread of transformers' continuous batching has ended by itself")

    def cause(self, error: Exception, patience: float = 5.0) -> BaseException:
        """What is behind the failure of a request: what has ended the library's thread, which fails them all first."""
        deadline = time.monotonic() + patience
        status = self._manager.background_thread_status
        while status.fatal_error is None and self._manager.is_running() and time.monotonic() < deadline:
            time.sleep(0.05)
        return status.fatal_error or error

    def put(self, output: GenerationOutput) -> None:
        """Called by the library, as on a queue, with each request that is finished or has failed."""
        draft = self._drafts.pop(output.request_id)
        if output.error is not None:
            self._tell(RuntimeError(f"request {output.request_id}: {output.error}"))
            return
        tokens, log_probs = tuple(output.generated_tokens), tuple(output.logprobs)
        assert 0 < len(tokens) == len(log_probs), f"{len(tokens)} tokens with {len(log_probs)} log-probabilities"
        generation = Generation(output.request_id, tokens, log_probs, draft.segments(len(tokens)))
        routes = record_to_bytes(draft.routes(len(tokens), self._blank)) if self._trace is not None else None
        self._tell(Finished(generation, routes))

    def _record_routes(self) -> None:
        routers = find_routers(self._model.language_model)
        if not routers:
            raise ConfigError("routing_replay has no effect: the model has no routers; leave it out")
        self._recorder = RoutingRecorder()
        self._blank = RoutingRecord.blank(routers, 1)
        self._trace = RouterTrace(routers, self._recorder).attach()

    def _after_forward(self, *_: Any) -> None:
        if self._trace is not None:
            self._keep_routes()
        now = time.monotonic()
        if now - self._last_beat >= HEARTBEAT_S:
            self._last_beat = now
            self._tell(Alive(len(self._drafts)))

    def _keep_routes(self) -> None:
        """Rows of the forward that has just ended, to the requests that they are of."""
        routes, row = self._recorder.take(), 0
        for scheduled in self._manager.batch_processor.inputs_and_outputs.requests_in_batch:
            state, count = scheduled.state, scheduled.query_length
            # The library has already moved it on by the tokens of this forward.
            position = state.position_offset - count
            rows = routes.rows(slice(row, row + count))
            self._drafts[state.request_id].record(position, rows, drawn=len(state.logprobs))
            row += count
