"""The vLLM backend against a server that checks what it is asked, and reads the files that it is given."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict

from tests.families import build, randomise_factors
from tests.grpo.backends.vllm_like import VllmLike, fingerprint
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.protocol import (
    BackendContext,
    BackendDeadError,
    BackendError,
    BackendHungError,
    Generation,
    GenerationRequest,
    Sampling,
)
from trl_moe_ext.grpo.backends.vllm.backend import VllmBackend
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig

CONFIG = MoeLoraConfig(r=8, expert_r=3)
SAMPLING = Sampling(max_completion_length=3, eos_token_ids=(2,))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A folder with the config of a model: the backend reads no weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    model = build("mixtral")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def snapshots() -> list[AdapterSnapshot]:
    """Versions 0 to 3 of an adapter, each with other weights."""
    model = get_peft_model(build("mixtral"), CONFIG)
    randomise_factors(model)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return [AdapterSnapshot(v, {key: tensor * (1 + v) for key, tensor in state.items()}) for v in range(4)]


@pytest.fixture
def serve(base) -> Iterator[Callable[..., VllmLike]]:
    servers: list[VllmLike] = []

    def make(**options: Any) -> VllmLike:
        servers.append(VllmLike(base, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()
    assert [problem for server in servers for problem in server.problems] == []


@pytest.fixture
def make(base, tmp_path, monkeypatch) -> Iterator[Callable[..., VllmBackend]]:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    backends: list[VllmBackend] = []

    def make(url: str, sampling: Sampling = SAMPLING, **options: Any) -> VllmBackend:
        options = {"max_inflight_tasks": 4, "max_staleness": 2, "vllm_server_timeout": 2.0} | options
        args = AsyncMoeGRPOConfig(str(tmp_path), vllm_server_base_url=url, bf16=False, use_cpu=True, **options)
        context = BackendContext(base, {"dtype": torch.float32}, CONFIG, sampling, args, str(tmp_path))
        backends.append(VllmBackend(context))
        return backends[-1]

    yield make
    for backend in backends:
        backend.stop()


def requests(count: int, start: int = 0) -> list[GenerationRequest]:
    return [GenerationRequest(f"{i}/0/0", (5, 6 + i, 7), seed=i) for i in range(start, start + count)]


def collect(backend: VllmBackend, count: int) -> list[Generation]:
    found: list[Generation] = []
    deadline = time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline:
        found += backend.collect(timeout=0.5)
    return found


def arrived(server: VllmLike, count: int) -> None:
    for _ in range(count):
        assert server.arrived.acquire(timeout=20)


def files(tmp_path: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[2] for path in (tmp_path / "rollout" / "adapters").glob("*"))


def test_completions_are_asked_for_in_full(serve, make, snapshots):
    server = serve()
    backend = make(server.url, Sampling(3, 0.7, 0.9, 20, 0.1, 1.2, (2, 9)))
    backend.start(snapshots[0])
    server.asked.clear()
    backend.submit(requests(6))
    found = {generation.id: generation for generation in collect(backend, 6)}
    assert sorted(found) == [f"{i}/0/0" for i in range(6)]
    for i in range(6):
        assert found[f"{i}/0/0"].token_ids == (i, 5, 6 + i)
        assert found[f"{i}/0/0"].segments[0].model_version == 0
    asked = next(body for body in server.asked if body["seed"] == 3)
    assert asked.pop("model").endswith("-v0")
    assert asked == {
        "prompt": [5, 9, 7],
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [2, 9],
        "seed": 3,
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }
    assert backend.pid is None


def test_a_request_ends_with_the_version_that_it_began_with(serve, make, snapshots, tmp_path):
    server = serve()
    backend = make(server.url, max_inflight_tasks=2)
    (tmp_path / "rollout" / "adapters" / "policy-0000-v9").mkdir(parents=True)  # of a trainer that was killed
    backend.start(snapshots[0])
    server.gate.clear()
    backend.submit(requests(3))  # two of them begin
    arrived(server, 2)
    expected = [fingerprint(folder) for folder in server.adapters.values()]
    for snapshot in snapshots[1:3]:
        backend.load_adapter(snapshot)
    expected.append(fingerprint(list(server.adapters.values())[-1]))
    assert files(tmp_path) == ["v0", "v2"]  # nobody used 1
    assert [name.rpartition("-")[2] for name in server.unloaded] == ["v1"]

    server.gate.set()
    found = {generation.id: generation for generation in collect(backend, 3)}
    assert [found[f"{i}/0/0"].model_version for i in range(3)] == [0, 0, 2]
    assert found["0/0/0"].log_probs == pytest.approx([expected[0]] * 3)
    assert found["2/0/0"].log_probs == pytest.approx([expected[1]] * 3)
    assert expected[0] != pytest.approx(expected[1])
    backend.load_adapter(snapshots[3])
    assert files(tmp_path) == ["v3"]
    assert [name.rpartition("-")[2] for name in server.adapters] == ["v3"]
    backend.stop()
    assert files(tmp_path) == []
    assert not server.adapters  # it goes on without us


def test_at_most_max_inflight_tasks_are_at_the_server(serve, make, snapshots):
    server = serve()
    backend = make(server.url, max_inflight_tasks=2)
    backend.start(snapshots[0])
    server.gate.clear()
    backend.submit(requests(5))
    arrived(server, 2)
    time.sleep(0.2)
    assert len(server.asked) == 2
    server.gate.set()
    assert len(collect(backend, 5)) == 5
    backend.max_in_flight = 1
    backend.start(snapshots[0])
    assert len(backend._requests._threads) == 1


@pytest.mark.parametrize(
    ("server", "named"),
    [
        ({"updates": False}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve .* --enable-lora"),
        ({"updates": False, "info": True}, "VLLM_ALLOW_RUNTIME_LORA_UPDATING is not set"),
        ({"lora": False}, "runs without --enable-lora"),
        ({"lora": False, "info": True}, "runs without --enable-lora"),
        ({"max_lora_rank": 4}, "rank 8 is greater than max_lora_rank 4.*--max-lora-rank 8 --max-loras 4"),
        ({"max_lora_rank": 4, "info": True}, "has --max-lora-rank 4, and 8 is needed"),
        ({"max_loras": 1, "info": True}, "has --max-loras 1, and 4 is needed.*--enable-mixed-moe-lora-format"),
        ({"max_model_len": 3}, "the server takes 3 tokens"),
        ({"key": "secret"}, "refuses the API key"),
    ],
)
def test_a_server_that_can_not_serve_is_refused_with_the_flags(server, named, serve, make, snapshots):
    backend = make(serve(**server).url)
    with pytest.raises(ConfigError, match=named):
        backend.start(snapshots[0])


@pytest.mark.parametrize(("longest", "fits"), [(61, True), (62, False)])
def test_the_longest_prompt_has_to_fit(longest, fits, serve, make, snapshots):
    backend = make(serve(max_model_len=64).url)
    backend.expect_prompts(longest)
    if fits:
        backend.start(snapshots[0])
    else:
        with pytest.raises(ConfigError, match=r"completion_length=3 .*prompt of 62 tokens: the server takes 64"):
            backend.start(snapshots[0])


def test_an_abort_ends_waiting_for_a_server(make, snapshots):
    backend = make("http://127.0.0.1:9", vllm_server_timeout=60.0)  # nothing listens there
    threading.Timer(0.5, backend.abort).start()
    began = time.monotonic()
    with pytest.raises(BackendDeadError, match="given up"):
        backend.start(snapshots[0])
    with pytest.raises(BackendDeadError, match="aborted"):
        backend.start(snapshots[0])
    assert time.monotonic() - began < 5


def test_a_version_that_can_not_be_unloaded_costs_no_completion(serve, make, snapshots, monkeypatch, caplog):
    monkeypatch.setattr("trl_moe_ext.grpo.backends.vllm.versions._UNLOAD_SECONDS", 0.2)
    server = serve()
    backend = make(server.url)
    backend.start(snapshots[0])
    server.unloading.clear()  # it does not answer any more
    server.gate.clear()
    backend.submit(requests(2))
    arrived(server, 2)
    backend.load_adapter(snapshots[1])
    server.gate.set()
    assert len(collect(backend, 2)) == 2
    began = time.monotonic()
    backend.load_adapter(snapshots[2])
    assert time.monotonic() - began < 2
    assert "keeps policy-" in caplog.text
    backend.submit(requests(2, start=2))
    assert [generation.model_version for generation in collect(backend, 2)] == [2, 2]
    server.unloading.set()
    backend.load_adapter(snapshots[3])
    assert [name.rpartition("-")[2] for name in server.adapters] == ["v3"]


def test_log_probs_of_another_distribution_are_refused(serve, make, snapshots):
    server = serve(processed=False)
    make(server.url).start(snapshots[0])  # nothing shapes the distribution: they are the same
    with pytest.raises(ConfigError, match="--logprobs-mode processed_logprobs"):
        make(server.url, Sampling(3, temperature=0.5)).start(snapshots[0])


def test_a_server_that_can_not_see_the_files_is_told_so(serve, make, snapshots, monkeypatch):
    server = serve()
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    with pytest.raises(ConfigError, match="both see under the same path"):
        make(server.url).start(snapshots[0])


def test_the_key_is_sent_and_asked_for_where_others_could_listen(serve, make, snapshots, monkeypatch):
    server = serve(key="secret")
    make(server.url, vllm_api_key="secret").start(snapshots[0])
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    make(server.url).start(snapshots[0])
    make("http://192.0.2.1:8000")
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(ConfigError, match="no API key"):
        make("http://192.0.2.1:8000")


def test_a_server_that_goes_away_is_dead(serve, make, snapshots, monkeypatch):
    monkeypatch.setattr("trl_moe_ext.grpo.backends.vllm.http._PAUSES", (0.05, 0.05))
    server = serve()
    backend = make(server.url)
    backend.start(snapshots[0])
    server.close()
    backend.submit(requests(1))
    with pytest.raises(BackendDeadError, match="can't be reached"):
        collect(backend, 1)
    with pytest.raises(BackendError, match="no vLLM server is ready"):
        make(server.url, vllm_server_timeout=0.5).start(snapshots[0])


def test_a_server_that_was_restarted_is_dead_and_started_again(serve, make, snapshots):
    server = serve()
    backend = make(server.url)
    backend.start(snapshots[0])
    server.adapters.clear()
    backend.submit(requests(1))
    with pytest.raises(BackendDeadError, match=r"knows policy-.*-v0 no more"):
        collect(backend, 1)
    backend.start(snapshots[0])
    backend.submit(requests(1))
    assert [generation.id for generation in collect(backend, 1)] == ["0/0/0"]


def test_a_busy_server_is_asked_again(serve, make, snapshots, monkeypatch):
    monkeypatch.setattr("trl_moe_ext.grpo.backends.vllm.http._PAUSES", (0.05, 0.05))
    server = serve()
    backend = make(server.url)
    backend.start(snapshots[0])
    server.failures = [503, 429]
    backend.submit(requests(1))
    assert len(collect(backend, 1)) == 1
    assert len(server.asked) == 3


def test_what_was_finished_is_handed_over_before_a_failure(serve, make, snapshots):
    server = serve()
    backend = make(server.url, max_inflight_tasks=1)
    backend.start(snapshots[0])
    too_long = GenerationRequest("long", tuple(range(80)), seed=1)
    backend.submit([*requests(1), too_long, *requests(1, start=1)])
    arrived(server, 3)
    assert [generation.id for generation in collect(backend, 1)] == ["0/0/0"]
    with pytest.raises(ConfigError, match="80 tokens of prompt: This model's maximum context length"):
        collect(backend, 2)
    assert [generation.id for generation in collect(backend, 1)] == ["1/0/0"]


def test_a_server_that_does_not_answer_is_hung_and_stopping_does_not_wait(serve, make, snapshots):
    server = serve()
    backend = make(server.url, request_timeout=1)
    backend.start(snapshots[0])
    server.gate.clear()
    backend.submit(requests(1))
    with pytest.raises(BackendHungError, match="in 1 s"):
        collect(backend, 1)
    backend.stop()

    backend = make(server.url, request_timeout=600)
    backend.start(snapshots[0])
    backend.submit(requests(4))
    arrived(server, 5)
    began = time.monotonic()
    backend.stop()
    backend.stop()
    assert time.monotonic() - began < 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vllm-")]


def test_routes_are_not_promised(base, tmp_path):
    args = AsyncMoeGRPOConfig(str(tmp_path), bf16=False, use_cpu=True, max_inflight_tasks=4)
    with pytest.raises(ConfigError, match="does not record routes"):
        VllmBackend(BackendContext(base, {}, CONFIG, SAMPLING, args, str(tmp_path), record_routes=True))
