"""Sparse upcycling: equal logits for every supported type, and a clear refusal of everything else."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from tests.real_model import smollm2_gguf
from trl_moe_ext.errors import ConfigError, LayoutError
from trl_moe_ext.experts import upcycle_weights
from trl_moe_ext.experts.upcycle import LOGITS_TOLERANCE, UpcycleOptions, upcycle
from trl_moe_ext.experts.upcycle_families import UPCYCLE_FAMILIES

# No two sizes alike, grouped-query attention, and heads that do not divide the hidden size where that is allowed.
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 6}

DENSE = {
    "llama": LlamaConfig(**SIZES, head_dim=12),
    "llama, tied, llama3 rope": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "llama, gelu, eps": LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh", rms_norm_eps=1e-2),
    "mistral": MistralConfig(**SIZES, head_dim=12, sliding_window=None),
    "mistral, sliding window": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, tied": Qwen2Config(**SIZES, tie_word_embeddings=True, use_sliding_window=False, sliding_window=6),
    "qwen3": Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True),
    "qwen3, biases": Qwen3Config(**SIZES, head_dim=12, attention_bias=True),
    "qwen3, sliding window": Qwen3Config(**SIZES, head_dim=12, **SLIDING, max_window_layers=0),
    "qwen3, unused window": Qwen3Config(**SIZES, head_dim=12, **SLIDING, max_window_layers=28),
}


def write_dense(directory: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    """A random model with weights so large that the logits tell layers, windows, biases and activations apart."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(directory)
    return directory


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_dense(tmp_path / "dense", DENSE["llama"])


def logits(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.float()(input_ids=input_ids).logits


@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE)
def test_the_logits_are_those_of_the_dense_model(tmp_path: Path, config: Any) -> None:
    dense = write_dense(tmp_path / "dense", config)
    report = upcycle(dense, tmp_path / "moe", UpcycleOptions(num_experts=4, top_k=2))
    before = AutoModelForCausalLM.from_pretrained(dense)
    after, info = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert after.config.model_type == report.target == UPCYCLE_FAMILIES[config.model_type].target

    input_ids = torch.randint(config.vocab_size, (2, 31))
    expected = logits(before, input_ids)
    assert expected.std() > 0.5, "logits so small that a wrong model would pass"
    assert (logits(after, input_ids) - expected).abs().max() < LOGITS_TOLERANCE
    assert report.max_difference < LOGITS_TOLERANCE
    generate = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(after.generate(input_ids, **generate), before.generate(input_ids, **generate))


def test_every_family_is_tried() -> None:
    assert {config.model_type for config in DENSE.values()} == set(UPCYCLE_FAMILIES)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 1), (5, 3), (8, 8)])
def test_any_number_of_experts(tmp_path: Path, dense: Path, num_experts: int, top_k: int) -> None:
    report = upcycle(dense, tmp_path / "moe", UpcycleOptions(num_experts=num_experts, top_k=top_k))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").config
    assert (config.num_local_experts, config.num_experts_per_tok) == (num_experts, top_k)
    mlps, routers = 3 * 3 * 32 * 44, 3 * 32 * num_experts
    assert report.parameters == report.dense_parameters + mlps * (num_experts - 1) + routers
    assert report.active_parameters == report.dense_parameters + mlps * (top_k - 1) + routers


def test_the_routers_choose_different_experts(tmp_path: Path, dense: Path) -> None:
    upcycle(dense, tmp_path / "moe", UpcycleOptions())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    router_logits = model(input_ids=torch.randint(101, (4, 64)), output_router_logits=True).router_logits
    chosen = torch.stack([layer.topk(2).indices.flatten().bincount(minlength=4) for layer in router_logits])
    assert (chosen > 0.05 * 4 * 64 * 2).all(), f"an expert is hardly used: {chosen.tolist()}"
    assert len({tuple(layer) for layer in chosen.tolist()}) == 3, "two layers route alike"


def test_a_seed_fixes_the_weights_and_noise_leaves_the_routers_alone(tmp_path: Path, dense: Path) -> None:
    def weights(name: str, **options: Any) -> dict[str, torch.Tensor]:
        upcycle(dense, tmp_path / name, UpcycleOptions(**options))
        return dict(AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict())

    first, again, other = weights("first"), weights("again"), weights("other", seed=1)
    noisy, gate = weights("noisy", noise=0.1), "model.layers.2.mlp.gate.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[gate], other[gate])
    assert torch.equal(first[gate], noisy[gate])


def test_noise_makes_experts_differ_by_as_much_as_asked(tmp_path: Path, dense: Path) -> None:
    report = upcycle(dense, tmp_path / "moe", UpcycleOptions(noise=0.1))
    assert report.max_difference > LOGITS_TOLERANCE
    mlp = AutoModelForCausalLM.from_pretrained(dense).model.layers[1].mlp
    experts = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").model.layers[1].mlp.experts
    originals = {
        "gate": (mlp.gate_proj.weight, experts.gate_up_proj[:, :44]),
        "up": (mlp.up_proj.weight, experts.gate_up_proj[:, 44:]),
        "down": (mlp.down_proj.weight, experts.down_proj),
    }
    for name, (original, copies) in originals.items():
        relative = (copies - original).std(dim=(1, 2)) / original.std()
        torch.testing.assert_close(relative, torch.full((4,), 0.1), rtol=0.1, atol=0, msg=name)


@pytest.mark.parametrize(
    ("written", "asked", "expected"),
    [("bfloat16", "auto", "bfloat16"), ("float32", "bfloat16", "bfloat16"), ("bfloat16", "float32", "float32")],
)
def test_dtype(tmp_path: Path, written: str, asked: str, expected: str) -> None:
    dense = write_dense(tmp_path / "dense", DENSE["qwen3"], getattr(torch, written))
    report = upcycle(dense, tmp_path / "moe", UpcycleOptions(dtype=asked))
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    assert {str(tensor.dtype).removeprefix("torch.") for tensor in stored.values()} == {expected}
    assert report.dtype == expected
    # Equal also in 16 bits: both are computed in fp32 from the same rounded weights.
    assert report.max_difference < LOGITS_TOLERANCE


def test_tokenizer_template_and_generation_settings_travel_along(tmp_path: Path, dense: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(dense)
    (dense / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    (dense / "LICENSE").write_text("the licence")
    upcycle(dense, tmp_path / "moe", UpcycleOptions())
    copied = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert copied.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "b!"
    for name in ("generation_config.json", "LICENSE"):
        assert (tmp_path / "moe" / name).read_text() == (dense / name).read_text()


# What a target's configuration could get wrong: a dense model that would notice, and the wrong fields.
WRONG_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "routing weights that do not sum to one": ("qwen3", {"norm_topk_prob": False}),
    "no window": ("qwen3, sliding window", {"sliding_window": None}),
    "a window that was not in use": ("qwen3, unused window", {"use_sliding_window": True, "sliding_window": 6}),
    "another epsilon": ("qwen2", {"rms_norm_eps": 0.5}),
    "another rope": ("llama, tied, llama3 rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "another activation": ("llama, gelu, eps", {"hidden_act": "silu"}),
}


@pytest.mark.parametrize(("name", "wrong"), WRONG_FIELDS.values(), ids=WRONG_FIELDS)
def test_a_wrong_configuration_is_found_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: dict[str, Any]
) -> None:
    dense = write_dense(tmp_path / "dense", DENSE[name])
    family = UPCYCLE_FAMILIES[DENSE[name].model_type]
    mutated = dataclasses.replace(family, options=lambda *args: family.options(*args) | wrong)
    monkeypatch.setitem(UPCYCLE_FAMILIES, DENSE[name].model_type, mutated)
    with pytest.raises(LayoutError, match="differ from the dense model's"):
        upcycle(dense, tmp_path / "moe", UpcycleOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_exchanged_projections_are_found(tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(mlp: Any, *args: Any) -> dict[str, torch.Tensor]:
        mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj
        return experts(mlp, *args)

    experts = upcycle_weights._experts
    monkeypatch.setattr(upcycle_weights, "_experts", exchanged)
    with pytest.raises(LayoutError, match="differ from the dense model's"):
        upcycle(dense, tmp_path / "moe", UpcycleOptions())


REFUSED_TYPES = {
    "a mixture": (Qwen3MoeConfig(**SIZES, num_experts=4), "mixture of experts already"),
    "llama with attention biases": (LlamaConfig(**SIZES, attention_bias=True), "attention_bias, and Mixtral has no"),
    "llama with MLP biases": (LlamaConfig(**SIZES, mlp_bias=True), "mlp_bias, and Mixtral has no biases"),
    "qwen2 with windows": (Qwen2Config(**SIZES, **SLIDING, max_window_layers=0), "whose window Qwen2-MoE ignores"),
    "qwen3 with some windows": (Qwen3Config(**SIZES, **SLIDING, max_window_layers=1), "only some of its layers"),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED_TYPES.values(), ids=REFUSED_TYPES)
def test_a_checkpoint_without_an_exact_mixture_is_refused(tmp_path: Path, config: Any, reason: str) -> None:
    dense = write_dense(tmp_path / "dense", config)
    with pytest.raises(LayoutError, match=reason):
        upcycle(dense, tmp_path / "moe", UpcycleOptions())
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "gpt2"}, "'gpt2' of .* exactly; supported: llama, mistral, qwen2, qwen3"),
        ({}, "model_type 'None'"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "is quantised"),
    ],
)
def test_a_configuration_is_refused_before_any_weight_is_read(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(LayoutError, match=reason):
        upcycle(tmp_path, tmp_path / "moe", UpcycleOptions())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_experts": 0}, "top_k 2 of num_experts 0"),
        ({"num_experts": 2, "top_k": 3}, "top_k 3 of num_experts 2"),
        ({"top_k": 0}, "top_k 0"),
        ({"noise": -0.1}, "noise -0.1"),
        ({"noise": float("nan")}, "noise nan"),
        ({"dtype": "float"}, "did you mean float32"),
    ],
)
def test_an_option_out_of_range_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        UpcycleOptions(**options)


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


UP = "model.layers.1.mlp.up_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no directory": (shutil.rmtree, "is not a directory"),
    "no config.json": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), "not a valid JSON"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no file named model.safetensors"),
    "truncated weights": (truncate, "cannot read the checkpoint"),
    "a weight missing": (lambda path: edit_weights(path, lambda w: w.pop(UP)), f"{UP} is missing"),
    "another shape": (
        lambda path: edit_weights(path, lambda w: w.update({UP: torch.ones(3, 4)})),
        r"up_proj.weight is \(3, 4\) instead of \(44, 32\)",
    ),
    "not finite": (lambda path: edit_weights(path, lambda w: w[UP].fill_(float("nan"))), "not finite"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, dense: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(dense)
    with pytest.raises(ConfigError, match=reason):
        upcycle(dense, tmp_path / "moe", UpcycleOptions())
    assert not (tmp_path / "moe").exists()


def test_a_gguf_file_must_be_named_and_readable(tmp_path: Path) -> None:
    (tmp_path / "small.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ConfigError, match=r"has small\.gguf: name one with --gguf-file"):
        upcycle(tmp_path, tmp_path / "moe", UpcycleOptions())
    with pytest.raises(ConfigError, match="cannot read the checkpoint"):
        upcycle(tmp_path, tmp_path / "moe", UpcycleOptions(), gguf_file="small.gguf")


def test_an_output_in_the_way_is_kept_unless_overwritten(tmp_path: Path, dense: Path) -> None:
    out = tmp_path / "moe"
    out.mkdir()
    upcycle(dense, out, UpcycleOptions())  # an empty directory is no obstacle
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty; give another directory or add --overwrite"):
        upcycle(dense, out, UpcycleOptions())
    assert (out / "notes.txt").exists()
    upcycle(dense, out, UpcycleOptions(), overwrite=True)
    assert not (out / "notes.txt").exists()
    assert (out / "config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]


@pytest.mark.parametrize("name", ["dense", "."])
def test_the_input_is_never_overwritten(tmp_path: Path, dense: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="holds the dense checkpoint"):
        upcycle(dense, tmp_path / name, UpcycleOptions(), overwrite=True)
    assert (dense / "model.safetensors").exists()


def test_a_file_in_the_way_of_the_output(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        upcycle(dense, tmp_path / "file", UpcycleOptions(), overwrite=True)
    with pytest.raises(ConfigError, match="cannot write to"):
        upcycle(dense, tmp_path / "file" / "moe", UpcycleOptions())


@pytest.mark.slow
def test_smollm2_from_gguf(tmp_path: Path) -> None:
    gguf = smollm2_gguf()
    report = upcycle(gguf.parent, tmp_path / "moe", UpcycleOptions(num_experts=4, top_k=2), gguf_file=gguf.name)
    assert (report.source, report.target, report.dtype) == ("llama", "mixtral", "float32")
    assert report.max_difference < LOGITS_TOLERANCE

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id, "the answer does not end"
