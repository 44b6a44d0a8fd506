"""The local generator draws what the trainer's model would, with the adapter that it was last given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

from tests.families import randomise_factors
from tests.grpo.backends.local_runs import (
    LOG_PROB_ATOL,
    PROMPTS,
    ask,
    collect,
    context,
    log_probs,
    save_model,
    snapshot,
    trainer_model,
    zero_snapshot,
)
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.local.backend import LocalBackend
from trl_moe_ext.grpo.backends.protocol import BackendError, Generation, GenerationRequest
from trl_moe_ext.router.record import NOT_RECORDED
from trl_moe_ext.router.recorder import RoutingRecorder
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.trace import RouterTrace

LONG = 300


class OfAFunction(LoraConfig):  # type: ignore[misc]
    """A config that holds what pickle can't take."""

    def __init__(self) -> None:
        super().__init__(target_modules=["q_proj"])
        self.chooses = lambda name: name


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trainer(model_path: str) -> PeftModel:
    return trainer_model(model_path)


@pytest.fixture(scope="module")
def backend(model_path: str, trainer: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    """Draws at temperature 0.7, long completions, and records routes."""
    options = {"temperature": 0.7, "max_completion_length": LONG, "record_routes": True, "eos_token_ids": (1,)}
    made = LocalBackend(context(model_path, tmp_path_factory.mktemp("run"), **options))
    made.start(zero_snapshot(trainer))
    yield made
    made.stop()


def close(found: torch.Tensor | tuple[float, ...], expected: torch.Tensor, tolerance: float = LOG_PROB_ATOL) -> bool:
    return torch.allclose(torch.as_tensor(found), expected, rtol=0, atol=tolerance)


def generate(backend: LocalBackend, adapter: AdapterSnapshot) -> list[tuple[tuple[int, ...], Generation]]:
    """With each completion its prompt."""
    backend.load_adapter(adapter)
    asked = ask(backend)
    return [(asked[generation.id], generation) for generation in collect(backend, len(asked))]


def test_log_probs_are_those_of_the_trainer_with_the_same_adapter(backend: LocalBackend, trainer: PeftModel) -> None:
    found = generate(backend, snapshot(trainer, version=1))
    assert len({generation.token_ids for _, generation in found}) > len(PROMPTS)  # completions of a prompt differ
    with trainer.disable_adapter():
        base = [log_probs(trainer, prompt, g.token_ids, temperature=0.7) for prompt, g in found]
    for (prompt, generation), without in zip(found, base):
        expected = log_probs(trainer, prompt, generation.token_ids, temperature=0.7)
        assert close(generation.log_probs, expected)
        assert not close(expected, without, 1e-2)
        assert generation.segments[0].model_version == generation.model_version == 1
        assert generation.segments[0].num_tokens == len(generation.token_ids)


def test_a_loaded_adapter_takes_the_place_of_the_one_before(backend: LocalBackend, trainer: PeftModel) -> None:
    generate(backend, snapshot(trainer, version=2))
    with trainer.disable_adapter():
        for prompt, generation in generate(backend, zero_snapshot(trainer, version=3)):
            assert close(generation.log_probs, log_probs(trainer, prompt, generation.token_ids, temperature=0.7))
            assert generation.model_version == 3


def test_a_completion_ends_with_the_end_token_or_at_its_length(backend: LocalBackend, trainer: PeftModel) -> None:
    for _, generation in generate(backend, zero_snapshot(trainer, version=4)):
        assert 1 not in generation.token_ids[:-1]
        assert len(generation.token_ids) == LONG or generation.token_ids[-1] == 1


def test_routes_are_those_of_a_full_forward(backend: LocalBackend, trainer: PeftModel) -> None:
    recorder = RoutingRecorder()
    for prompt, generation in generate(backend, snapshot(trainer, version=5)):
        with RouterTrace(find_routers(trainer), recorder), torch.no_grad():
            trainer(torch.tensor([[*prompt, *generation.token_ids]]))
        expected = recorder.take()
        assert generation.routes is not None
        assert generation.routes.num_experts == expected.num_experts
        for label, experts in generation.routes.experts.items():
            assert experts[-1].eq(NOT_RECORDED).all()
            # The order of a token's experts is that of their scores, which may be equal.
            assert torch.equal(experts[:-1].sort(-1).values, expected.experts[label][:-1].sort(-1).values)


@torch.no_grad()
def test_segments_across_an_adapter_that_arrives_meanwhile(backend: LocalBackend, trainer: PeftModel) -> None:
    """Tokens of the second segment are drawn by the new adapter over the old one's keys and values."""
    backend.load_adapter(zero_snapshot(trainer, version=6))
    asked = ask(backend)
    time.sleep(0.5)
    backend.load_adapter(snapshot(trainer, version=7))
    swapped = [generation for generation in collect(backend, len(asked)) if len(generation.segments) == 2]
    assert swapped  # else nothing was under way: LONG is too short for this machine
    for generation in swapped:
        old, new = generation.segments
        assert (old.model_version, new.model_version, generation.model_version) == (6, 7, 6)
        prompt, tokens = asked[generation.id], generation.token_ids
        assert old.num_tokens + new.num_tokens == len(tokens)
        # The new adapter runs first on the last token of the old one.
        ids, border = torch.tensor([[*prompt, *tokens]]), len(prompt) + old.num_tokens - 1
        with trainer.disable_adapter():
            before = trainer(ids[:, :border], use_cache=True)
        after = trainer(ids[:, border:-1], past_key_values=before.past_key_values)
        logits = torch.cat([before.logits, after.logits], 1)[0, len(prompt) - 1 :] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert close(generation.log_probs, expected)


def test_a_request_that_the_cache_can_not_hold_is_refused(backend: LocalBackend) -> None:
    with pytest.raises(ConfigError, match=r"request long: a prompt of 99999 tokens.*num_blocks"):
        backend.submit([GenerationRequest("long", (5,) * 99_999, seed=0)])
    assert backend.collect(0.0) == []


class DamagedOnce(AdapterSnapshot):
    """Arrives damaged, so many times."""

    times: int

    @property
    def payload(self) -> bytes:  # type: ignore[override]
        good = AdapterSnapshot(self.version, self.tensors).payload
        object.__setattr__(self, "times", self.times - 1)
        return good if self.times < 0 else good[:-1] + bytes([good[-1] ^ 1])

    @property
    def checksum(self) -> str:  # type: ignore[override]
        return AdapterSnapshot(self.version, self.tensors).checksum


def damaged(trainer: PeftModel, version: int, times: int) -> AdapterSnapshot:
    made = DamagedOnce(version, snapshot(trainer).tensors)
    object.__setattr__(made, "times", times)
    return made


def test_a_damaged_adapter_is_sent_again_once(backend: LocalBackend, trainer: PeftModel) -> None:
    backend.load_adapter(damaged(trainer, 8, times=1))
    with pytest.raises(BackendError, match=r"damaged twice.*version 9"):
        backend.load_adapter(damaged(trainer, 9, times=2))
    ask(backend, 1)
    assert collect(backend, 1)[0].model_version == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"temperature": 0.0}, "temperature"),
        ({"transformers_continuous_batching_config": {"num_block": 5}}, "did you mean num_blocks"),
        ({"transformers_continuous_batching_config": {"allow_block_sharing": True}}, "an older adapter"),
        ({"transformers_continuous_batching_config": {"use_async_batching": True}}, "of no version"),
        ({"transformers_continuous_batching_config": {"return_logprobs": False}}, "log-probabilities"),
        ({"transformers_continuous_batching_config": {"use_cuda_graph": True}}, "use_cuda_graph=True.*signs of"),
        ({"transformers_continuous_batching_config": {"use_cuda_graph": [False, True]}}, "use_cuda_graph"),
        (
            {"model_init_kwargs": {"quantization_config": lambda: 0}},
            r"kwargs\['quantization_config'\]=<fun",
        ),
        ({"peft_config": OfAFunction()}, "peft_config=.*can't be sent"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_can_not_be_served_are_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    model_init_kwargs = options.pop("model_init_kwargs", {})
    made = replace(context("model", tmp_path, **options), model_init_kwargs=model_init_kwargs)
    with pytest.raises(ConfigError, match=message):
        LocalBackend(made)


def test_graphs_that_are_switched_off_are_no_graphs(tmp_path: Path) -> None:
    for value in (False, [False, False], None):
        LocalBackend(context("model", tmp_path, transformers_continuous_batching_config={"use_cuda_graph": value}))


def test_the_cache_is_for_the_longest_prompt_and_what_is_in_flight(
    model_path: str, trainer: PeftModel, tmp_path: Path
) -> None:
    longest = 1500
    backend = LocalBackend(context(model_path, tmp_path, max_inflight_tasks=64))
    backend.expect_prompts(longest)
    backend.max_in_flight = 2
    try:
        backend.start(snapshot(trainer))
        # Of a request that has the cache for itself.
        assert 2 <= backend._max_request_tokens / (longest + 12) < 2.1
        ask(backend, 1, [(5, 9) * (longest // 2)])
        assert len(collect(backend, 1)[0].token_ids) == 12
    finally:
        backend.stop()


def test_prompts_that_the_given_cache_can_not_hold_are_refused_at_the_start(
    model_path: str, trainer: PeftModel, tmp_path: Path
) -> None:
    cache = {"page_size": 32, "num_blocks": 4}
    backend = LocalBackend(context(model_path, tmp_path, transformers_continuous_batching_config=cache))
    backend.expect_prompts(500)
    with pytest.raises(ConfigError, match=r"the dataset: a prompt of 500 tokens.*=12 need 512.*num_blocks"):
        backend.start(snapshot(trainer))
    assert backend.pid is None


def test_an_adapter_of_another_kind_is_refused_and_nothing_is_left(
    model_path: str, trainer: PeftModel, tmp_path: Path
) -> None:
    backend = LocalBackend(context(model_path, tmp_path, peft_config=LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ConfigError, match=r"not for the generator's model: \d+ .*unknown"):
        backend.start(snapshot(trainer))
    assert backend.pid is None


def test_other_adapters_and_ways_to_draw(model_path: str, tmp_path: Path) -> None:
    """PEFT's own LoRA, and a distribution that is cut: log-probabilities are of what is left of it."""
    config = LoraConfig(target_modules=["q_proj", "o_proj"], r=2)
    trainer = trainer_model(model_path, config)
    randomise_factors(trainer)
    backend = LocalBackend(context(model_path, tmp_path, peft_config=config, top_k=5, top_p=0.9, min_p=0.05))
    try:
        backend.start(snapshot(trainer))
        asked = ask(backend, 4)
        for generation in collect(backend, 4):
            ids = torch.tensor([[*asked[generation.id], *generation.token_ids]])
            with torch.no_grad():
                logits = trainer(ids).logits[0, len(asked[generation.id]) - 1 : -1]
            for token, log_prob, row in zip(generation.token_ids, generation.log_probs, logits):
                assert token in row.topk(5).indices
                full = row.log_softmax(-1)[token].item()
                assert full - LOG_PROB_ATOL <= log_prob <= 1e-6
            assert generation.routes is None
    finally:
        backend.stop()
