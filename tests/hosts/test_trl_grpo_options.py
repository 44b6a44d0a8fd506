"""Continuous batching in `trl grpo` and `trl rloo`: the cache that a batch needs, and only with moe_lora."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.generation import ContinuousBatchingConfig

from tests.hosts.processes import run
from tests.tiny_checkpoints import VOCAB_SIZE, byte_tokenizer
from trl_moe_ext.hosts import trl_grpo_options
from trl_moe_ext.hosts.trl_grpo_options import TRAINERS, bound_cache, with_bounded_cache

GIBIBYTE = 2**30
PROMPTS = [[1] * 20, [1] * 40]
MAX_COMPLETION = 24


def tiny_model() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=32,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=4,
            num_experts_per_tok=2,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


class Stock:
    """As far as TRL's trainers are looked at."""

    def __init__(self, given: dict[str, Any] | None = None, is_wanted: bool = True, device: str = "cpu") -> None:
        self.accelerator = SimpleNamespace(device=torch.device(device))
        self.args = SimpleNamespace(
            max_completion_length=MAX_COMPLETION,
            transformers_continuous_batching_config=given,
            bf16=False,
            fp16=False,
        )
        self.model = SimpleNamespace(config=tiny_model().config, dtype=torch.float32)
        self.use_transformers_continuous_batching = is_wanted
        self.continuous_batching_config = ContinuousBatchingConfig(**(given or {})) if is_wanted else None

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: None, fields: None, count: int) -> Any:
        return self.continuous_batching_config, count


def config_of(prompts: list[list[int]] = PROMPTS, **options: Any) -> Any:
    config, count = with_bounded_cache(Stock)(**options)._generate_single_turn(prompts, None, None, count=3)
    assert count == 3
    return config


def tokens_held(config: ContinuousBatchingConfig) -> int:
    assert config.num_blocks is not None
    return config.num_blocks * config.page_size


def test_the_cache_holds_the_batch_and_little_more() -> None:
    config = config_of()
    longest = max(map(len, PROMPTS)) + MAX_COMPLETION
    assert len(PROMPTS) * longest <= tokens_held(config) <= 2 * len(PROMPTS) * longest
    assert config.max_batch_tokens is not None
    assert config.max_batch_tokens < 1024
    assert config.allow_block_sharing  # TRL makes a new cache for each batch


def test_it_follows_the_batch() -> None:
    trainer = with_bounded_cache(Stock)()
    sizes = []
    for length in (10, 400, 10):
        trainer._generate_single_turn([[1] * length] * 4, None, None, 1)
        sizes.append(tokens_held(trainer.continuous_batching_config))
    assert sizes[0] == sizes[2]
    assert sizes[1] >= 4 * (400 + MAX_COMPLETION) > 4 * sizes[0]


def test_more_completions_than_are_fast_at_once_wait_their_turn() -> None:
    config = config_of([[1] * 40] * 1000)
    assert config.max_requests_per_batch == 64
    assert tokens_held(config) < 1000 * 40


@pytest.mark.parametrize(
    "given",
    [
        {"num_blocks": 3},
        {"page_size": 8},
        {"max_batch_tokens": 77},
        {"max_requests_per_batch": 1},
        {"num_blocks": 5, "page_size": 16, "max_batch_tokens": 9, "allow_block_sharing": False},
    ],
    ids=lambda given: "-".join(given),
)
def test_what_the_user_set_stays(given: dict[str, Any]) -> None:
    config = config_of(given=given)
    assert {name: getattr(config, name) for name in given} == given
    assert None not in (config.num_blocks, config.max_batch_tokens)


def test_a_share_of_the_memory_that_was_asked_for_is_a_size() -> None:
    assert config_of(given={"max_memory_percent": 0.1}).num_blocks is None


def test_a_cache_larger_than_the_memory_is_as_large_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    long = [[1] * 5000] * 64
    free = config_of(long).num_blocks
    monkeypatch.setattr(trl_grpo_options, "_free_memory", lambda device: GIBIBYTE // 4)
    assert 0 < config_of(long).num_blocks < free


def test_pages_on_a_gpu_are_those_that_its_kernels_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_grpo_options, "_free_memory", lambda device: 8 * GIBIBYTE)
    assert config_of(device="cuda").page_size % 256 == 0


def test_without_continuous_batching_nothing_is_touched() -> None:
    assert config_of(is_wanted=False) is None


def test_the_scripts_that_generate_get_it_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for script, name in TRAINERS.items():
        stock = getattr(trl, name)
        monkeypatch.setitem(vars(sys.modules["trl"]), name, stock)  # put back when the test ends
        bound_cache(None)
        bound_cache("sft")
        assert getattr(trl, name) is stock
        bound_cache(script)
        bound_cache(script)
        ours = getattr(trl, name)
        assert ours.__mro__[1] is stock
        assert ours.__name__ == stock.__name__


# -- the command ------------------------------------------------------------------------------------------------------

REWARD = "def long(completions, **others):\n    return [float(len(c) % 7) for c in completions]\n"
# Runs the script as `trl grpo` does after its launch, and tells what the cache and the process were like.
SCRIPT = """
import json, resource, runpy, sys
from transformers.generation.continuous_batching import cache
made = []
init = cache.PagedAttentionCache.__init__
def note(self, *args, **kwargs):
    init(self, *args, **kwargs)
    made.append([self.cache_tensor.numel(), self.max_batch_tokens])
cache.PagedAttentionCache.__init__ = note
sys.argv = ["grpo", *sys.argv[1:]]
runpy.run_module("trl.scripts.grpo", run_name="__main__", alter_sys=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
open("seen.json", "w").write(json.dumps({"made": made, "peak": peak}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"prompt": f"Count to {n}."}) for n in range(8)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "run.py").write_text(SCRIPT)
    return tmp_path


COMMAND = [
    *("--model_name_or_path", "model", "--dataset_name", "data", "--reward_funcs", "rewards.long"),
    *("--use_transformers_continuous_batching", "true", "--num_generations", "4", "--max_completion_length", "8"),
    *("--per_device_train_batch_size", "4", "--max_steps", "2", "--use_cpu", "true", "--bf16", "false"),
    *("--report_to", "none", "--save_strategy", "no", "--output_dir", "out", "--dtype", "float32"),
    *("--peft_type", "moe_lora", "--lora_r", "2"),
]


def test_two_steps_of_the_script_in_little_memory(folder: Path) -> None:
    done = run([sys.executable, "run.py", *COMMAND], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((folder / "seen.json").read_text())
    assert len(seen["made"]) == 2
    for num_bytes, max_batch_tokens in seen["made"]:
        assert num_bytes < 2**20
        assert max_batch_tokens < 1024
    assert seen["peak"] < 2 * GIBIBYTE
    config = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOE_LORA"
    assert "Adapter:" in done.stdout
