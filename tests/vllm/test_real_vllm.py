"""A real vLLM server on a CPU, with a dense model: its adapter support for routed experts needs a GPU.

Needs the environment that `make_env.py` builds, named by TRL_MOE_VLLM_PYTHON, and SmolLM2 (see `tests/real_model.py`).
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoTokenizer, GgufConfig

from tests.real_model import smollm2_gguf
from trl_moe_ext.experts.upcycle_files import load_model
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.protocol import BackendContext, Generation, GenerationRequest, Sampling
from trl_moe_ext.grpo.backends.vllm.backend import VllmBackend
from trl_moe_ext.grpo.backends.vllm.http import VllmHttp
from trl_moe_ext.grpo.backends.vllm.server import PYTHON_VARIABLE
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # of libraries that only this test meets
]
TEMPERATURE, LENGTH = 0.8, 16
ENDS = (2, 28, 30, 260, 281, 282, 284)  # the end of a text, a comma, a full stop, and the like
KEY = "a key"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> PeftModel:
    """SmolLM2-135M in float32, saved, with a LoRA adapter on all of its Linears."""
    if not os.environ.get(PYTHON_VARIABLE):
        pytest.skip(f"{PYTHON_VARIABLE} names no interpreter with vLLM: see tests/vllm/make_env.py")
    gguf = smollm2_gguf()
    folder = tmp_path_factory.mktemp("SmolLM2")
    plain = GgufConfig(dequantize=True)
    base = load_model(gguf.parent, torch.float32, gguf_file=gguf.name, quantization_config=plain)
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern={"down_proj": 6})
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    return model.eval()


def randomise(model: PeftModel, std: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, std)


def snapshot(model: PeftModel, version: int) -> AdapterSnapshot:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return AdapterSnapshot(version, {key: tensor.clone() for key, tensor in state.items()})


@pytest.fixture
def backend(model, tmp_path, monkeypatch) -> Iterator[VllmBackend]:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = AsyncMoeGRPOConfig(
        str(tmp_path),
        vllm_server_base_url=f"http://127.0.0.1:{port}",
        vllm_api_key=KEY,
        start_vllm=True,
        vllm_server_args=["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4"],
        max_inflight_tasks=4,
        max_staleness=1,
        bf16=False,
        use_cpu=True,
    )
    sampling = Sampling(LENGTH, TEMPERATURE, eos_token_ids=ENDS)
    config = model.peft_config["default"]
    path = config.base_model_name_or_path
    backend = VllmBackend(BackendContext(path, {"dtype": torch.float32}, config, sampling, args, str(tmp_path)))
    yield backend
    backend.stop()


def generate(backend: VllmBackend, count: int = 4) -> list[Generation]:
    backend.submit([GenerationRequest(f"{i}/0/0", (504, 3575, 282, 4649 + i, 314), seed=i) for i in range(count)])
    found: list[Generation] = []
    deadline = time.monotonic() + 120
    while len(found) < count and time.monotonic() < deadline:
        found += backend.collect(timeout=1.0)
    return sorted(found, key=lambda generation: generation.id)


@torch.no_grad()
def differences(model: PeftModel, generations: list[Generation]) -> torch.Tensor:
    """Of every token: by how much the server's log-probability is another than that of transformers."""
    found = []
    for i, generation in enumerate(generations):
        prompt = [504, 3575, 282, 4649 + i, 314]
        logits = model(torch.tensor([prompt + list(generation.token_ids)])).logits[0, len(prompt) - 1 : -1].float()
        expected = (logits / TEMPERATURE).log_softmax(-1)[range(len(generation.token_ids)), generation.token_ids]
        found.append((expected - torch.tensor(generation.log_probs)).abs())
    return torch.cat(found)


def ended(session: int, within: float = 10.0) -> bool:
    """Whether all processes of a session are gone; those that only wait to be counted by their parent are."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        listed = subprocess.run(["ps", "-o", "stat=", "-g", str(session)], capture_output=True, text=True).stdout
        if all(state.startswith("Z") for state in listed.split()):
            return True
        time.sleep(0.1)
    return False


def test_the_server_generates_with_the_adapter_that_it_was_last_given(model, backend, tmp_path):
    backend.start(snapshot(model, 0))  # B is zero: the base model
    pid = backend.pid
    assert pid is not None
    base = generate(backend)
    assert [generation.model_version for generation in base] == [0] * 4
    rounding = differences(model, base)
    short = [generation.token_ids for generation in base if len(generation.token_ids) < LENGTH]
    assert short
    assert all(tokens[-1] in ENDS and not set(tokens[:-1]) & set(ENDS) for tokens in short)

    randomise(model, 0.1)
    backend.load_adapter(snapshot(model, 1))
    adapted = generate(backend)
    assert [generation.model_version for generation in adapted] == [1] * 4
    close = differences(model, adapted)
    with model.disable_adapter():
        far = differences(model, adapted)
    print(
        f"base {rounding.mean():.4f} (largest {rounding.max():.4f}), adapter {close.mean():.4f} "
        f"(largest {close.max():.4f}), without the adapter {far.mean():.4f}"
    )
    # In float32 both compute the same up to the order of sums; the adapter moves log-probabilities by far more.
    assert rounding.max() < 1e-3
    assert close.max() < 1e-3
    assert far.mean() > 0.1

    client = VllmHttp(backend._client.base_url, KEY, timeout=60)
    names = [card["id"] for card in client.get("/v1/models").body["data"] if card["parent"]]
    assert len(names) == 1  # version 0 was unloaded when nobody used it
    assert names[0].endswith("-v1")
    assert [path.name for path in Path(tmp_path, "rollout", "adapters").iterdir()] == names

    backend.stop()
    assert ended(pid)
    assert backend.pid is None
