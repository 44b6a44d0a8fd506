"""Continuous batching, watched: requests that are prefilled in pieces, or thrown out of the cache and run again."""

from __future__ import annotations

import os
import pickle
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests.grpo.backends.local_runs import LOG_PROB_ATOL, PEFT, PROMPTS, log_probs, save_model, snapshot, trainer_model
from trl_moe_ext.grpo.backends.local.draft import Draft
from trl_moe_ext.grpo.backends.local.engine import LocalEngine
from trl_moe_ext.grpo.backends.local.model import AdaptedModel
from trl_moe_ext.grpo.backends.local.wire import Alive, Finished, Setup
from trl_moe_ext.grpo.backends.protocol import GenerationRequest, Sampling, Segment
from trl_moe_ext.router.record import RoutingRecord
from trl_moe_ext.router.record_bytes import record_from_bytes
from trl_moe_ext.router.recorder import RoutingRecorder
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.trace import RouterTrace

COUNT, LENGTH = 6, 24
SETUP = Setup(
    model_path="",
    model_init_kwargs={"dtype": "float32"},
    peft_config=pickle.dumps(PEFT),
    sampling=Sampling(max_completion_length=LENGTH),
    prompt_tokens=8,
    max_requests=COUNT,
    cache={"page_size": 4, "num_blocks": 16, "max_batch_tokens": 5, "safety_margin": 0.0},
    seed=0,
    device="cpu",
    num_threads=torch.get_num_threads(),
    record_routes=True,
    pad_token_id=0,
    parent_pid=os.getppid(),
)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trainer(model_path: str) -> PeftModel:
    return trainer_model(model_path)


@pytest.fixture
def engine(model_path: str) -> Iterator[tuple[LocalEngine, queue.SimpleQueue[Any]]]:
    """With a cache of 64 tokens, of which 5 are prefilled at a time, for requests of up to 31."""
    setup = replace(SETUP, model_path=model_path)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    made = LocalEngine(setup, inbox.put)
    yield made, inbox
    made._manager.stop(block=True, hard_stop=True)


def test_requests_that_share_too_small_a_cache(
    engine: tuple[LocalEngine, queue.SimpleQueue[Any]], trainer: PeftModel
) -> None:
    made, inbox = engine
    thrown_out = count_thrown_out(made)
    made.load(snapshot(trainer))
    asked = {str(i): PROMPTS[i % len(PROMPTS)] for i in range(COUNT)}
    made.submit([GenerationRequest(id, prompt, seed=0) for id, prompt in asked.items()])
    for message in finished(inbox):
        generation, prompt = message.generation, asked[message.generation.id]
        assert len(generation.token_ids) == LENGTH
        expected = log_probs(trainer, prompt, generation.token_ids)
        assert torch.allclose(torch.tensor(generation.log_probs), expected, rtol=0, atol=LOG_PROB_ATOL)
        assert message.routes is not None
        assert same_experts(record_from_bytes(message.routes), trainer, [*prompt, *generation.token_ids])
    assert thrown_out  # else the cache was not too small


def test_a_model_is_found_where_its_options_say(tmp_path: Path) -> None:
    """The config as well as the weights; who asks for them (a token) takes the same way."""
    save_model(tmp_path / "inner")
    options = {"subfolder": "inner", "dtype": "float32"}
    setup = replace(SETUP, model_path=str(tmp_path), model_init_kwargs=options)
    assert AdaptedModel(setup).language_model.config.model_type == "qwen3_moe"


def count_thrown_out(engine: LocalEngine) -> list[int]:
    """A list that grows each time that requests are thrown out of the cache."""
    manager = engine._manager.batch_processor.offloading_manager
    original, seen = manager.offload_requests, []

    def counted() -> Any:
        seen.append(1)
        return original()

    manager.offload_requests = counted
    return seen


def finished(inbox: queue.SimpleQueue[Any]) -> list[Finished]:
    found: list[Finished] = []
    while len(found) < COUNT:
        message = inbox.get(timeout=60)
        if isinstance(message, Exception):
            raise message
        if not isinstance(message, Alive):
            found.append(message)
    return found


def same_experts(found: RoutingRecord, model: PeftModel, tokens: list[int]) -> bool:
    recorder = RoutingRecorder()
    with RouterTrace(find_routers(model), recorder), torch.no_grad():
        model(torch.tensor([tokens]))
    expected = recorder.take().experts
    pairs = [(found.experts[label][:-1], expected[label][:-1]) for label in expected]
    return all(torch.equal(ours.sort(-1).values, theirs.sort(-1).values) for ours, theirs in pairs)


def routes(*experts: int) -> RoutingRecord:
    return RoutingRecord.of({"0": torch.tensor(experts)[:, None]}, {"0": 8})


def test_a_draft_counts_the_tokens_of_each_version() -> None:
    draft = Draft(prompt_length=3, version=1)
    draft.switch(2, drawn=0)
    draft.switch(3, drawn=4)
    draft.switch(4, drawn=4)
    draft.switch(5, drawn=6)
    assert draft.segments(6) == (Segment(2, 4), Segment(4, 2))
    assert draft.segments(7) == (Segment(2, 4), Segment(4, 2), Segment(5, 1))


def test_routes_of_tokens_that_were_drawn_outlive_a_second_prefill() -> None:
    draft = Draft(prompt_length=3, version=0)
    draft.record(0, routes(0, 0), drawn=0)
    draft.record(0, routes(1, 1, 1), drawn=0)  # from the beginning again: nothing was drawn with those before
    draft.record(3, routes(2), drawn=1)
    draft.record(0, routes(7, 7), drawn=2)
    draft.record(2, routes(7, 7, 3), drawn=2)
    found = draft.routes(num_tokens=3, blank=routes(-1))
    assert found.experts["0"].flatten().tolist() == [1, 1, 1, 2, 3, -1]


def test_routes_with_a_gap_are_an_error() -> None:
    draft = Draft(prompt_length=3, version=0)
    draft.record(0, routes(1, 1, 1), drawn=0)
    with pytest.raises(AssertionError, match="1 tokens before position 4"):
        draft.record(4, routes(2), drawn=1)
    with pytest.raises(AssertionError, match="3 tokens of 4"):
        draft.routes(num_tokens=2, blank=routes(-1))
