"""TRL's async GRPO without a GPU, a kernel from the Hub or a client of a server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trl_moe_ext.grpo.trl_async import packing_module, trainer_module
from trl_moe_ext.hosts import trl_async_grpo
from trl_moe_ext.hosts.trl_async_grpo import TreeKernel, install

NAMES = [
    (trainer_module, "get_peak_flops_per_device"),
    (packing_module, "_flash_attn"),
    (trainer_module, "VLLMClient"),
]


def test_installed_once():
    install()
    first = [getattr(module, name) for module, name in NAMES]
    install()
    assert [getattr(module, name) for module, name in NAMES] == first


def test_a_cpu_has_no_peak_that_is_known():
    install()
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    assert trainer_module.get_peak_flops_per_device(accelerator, "float32") is None


def test_a_gpu_is_asked_as_before():
    peak = trl_async_grpo._peak_flops_of_gpus(lambda accelerator, dtype: 5.0)
    assert peak(SimpleNamespace(device=torch.device("cuda")), "bfloat16") == 5.0


class OnGpu(SimpleNamespace):
    """What the choice of a kernel looks at."""

    is_cuda = True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_a_gpu_takes_the_kernel_of_the_hub(dtype):
    asked = []

    def fetch():
        asked.append(1)
        return SimpleNamespace(flash_attn_varlen_func=lambda query, *others, **options: ("hub", options))

    kernel = TreeKernel(fetch)
    found = [kernel.flash_attn_varlen_func(OnGpu(dtype=dtype), causal=True) for _ in range(2)]
    assert found == [("hub", {"causal": True})] * 2
    assert asked == [1]


def test_without_the_kernel_there_is_one_warning(monkeypatch):
    def fetch():
        raise OSError("no network")

    monkeypatch.setattr(trl_async_grpo, "varlen_attention", lambda query, *others: "pytorch")
    kernel = TreeKernel(fetch)
    with pytest.warns(RuntimeWarning, match="OSError: no network"):
        assert kernel.flash_attn_varlen_func(OnGpu(dtype=torch.bfloat16)) == "pytorch"
    # A second one would be an error here.
    assert kernel.flash_attn_varlen_func(OnGpu(dtype=torch.bfloat16)) == "pytorch"


@pytest.mark.parametrize(
    "query", [OnGpu(dtype=torch.float32), torch.zeros(1, dtype=torch.bfloat16)], ids=["f32", "cpu"]
)
def test_what_no_kernel_is_for_does_not_fetch_one(query, monkeypatch):
    monkeypatch.setattr(trl_async_grpo, "varlen_attention", lambda query, *others: "pytorch")
    kernel = TreeKernel(lambda: pytest.fail("it was fetched"))
    assert kernel.flash_attn_varlen_func(query) == "pytorch"


def test_a_client_that_cannot_be_made_is_an_error_only_when_it_is_used():
    def client(url, timeout):
        raise ImportError("requests is not installed")

    made = trl_async_grpo._client_when_needed(client)("http://localhost", 1.0)
    with pytest.raises(ImportError, match="requests is not installed"):
        made.wait_for_server_ready()
    assert trl_async_grpo._client_when_needed(lambda url: url)("http://localhost") == "http://localhost"
