"""The checkpoint, the tokenizer and the dataset of configs/quickstart are small, whole and really trained."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from datasets import load_dataset
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeForCausalLM
from trl import ModelConfig, ScriptArguments, SFTConfig

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"
MEGABYTE = 10**6


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    """Make the scripts of the folder importable, as they are when one of them runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(QUICKSTART))
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(QUICKSTART / "model")


@pytest.fixture(scope="module")
def measure(_importable: None) -> ModuleType:
    return importlib.import_module("measure")


@pytest.fixture(scope="module")
def corpus(_importable: None) -> ModuleType:
    return importlib.import_module("harbour.corpus")


@pytest.fixture(scope="module")
def keeper(_importable: None) -> ModuleType:
    return importlib.import_module("harbour.keeper")


@pytest.fixture
def model() -> Qwen3MoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")


def test_the_folder_is_small_and_holds_one_binary() -> None:
    caches = ("__pycache__", ".mypy_cache", ".ruff_cache")
    files = [file for file in QUICKSTART.rglob("*") if file.is_file() and not any(c in file.parts for c in caches)]
    assert sum(file.stat().st_size for file in files) <= 10 * MEGABYTE
    assert sum(file.stat().st_size for file in files if file.parent.name == "data") < 0.2 * MEGABYTE
    binaries = [file.name for file in files if b"\0" in file.read_bytes()]
    assert binaries == ["model.safetensors"]


def test_model_is_a_qwen3_moe_that_loads_in_float32(model: Qwen3MoeForCausalLM) -> None:
    assert type(model) is Qwen3MoeForCausalLM
    assert model.config.model_type == "qwen3_moe"
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (8, 2)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.dtype == torch.float32
    with safe_open(QUICKSTART / "model" / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_special_tokens_agree(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.encode("<|im_start|><|im_end|><|endoftext|>") == tokenizer.convert_tokens_to_ids(
        ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    )


def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Naïve gulls, 27 of them:\n\tsay はい & <go>."
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_is_chatml_and_masks_the_replies(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello!"},
        {"role": "assistant", "content": "Ahoy."},
        {"role": "user", "content": "Bye."},
        {"role": "assistant", "content": "Fair winds."},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat)
    prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("<|im_start|>assistant\n")
    encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    mine = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(mine) == "Ahoy.<|im_end|>Fair winds.<|im_end|>"


def test_dataset_has_a_train_and_a_test_split(tmp_path: Path) -> None:
    dataset = load_dataset(str(QUICKSTART / "data"), cache_dir=str(tmp_path))
    assert set(dataset) == {"train", "test"}
    assert len(dataset["train"]) >= 300
    assert len(dataset["test"]) >= 50
    for split in dataset.values():
        for chat in split["messages"]:
            assert [turn["role"] for turn in chat] == ["user", "assistant"] * (len(chat) // 2)


def test_dataset_is_what_the_script_writes(keeper: ModuleType, tmp_path: Path) -> None:
    keeper.write_dataset(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (QUICKSTART / "data" / name).read_bytes()


def test_no_answer_of_the_test_split_is_trained_on(keeper: ModuleType) -> None:
    train, test = ({turn["content"] for chat in part for turn in chat[1::2]} for part in keeper.fine_tuning_rows())
    assert not train & test


def test_pretraining_shows_every_token_of_the_dataset(
    corpus: ModuleType, keeper: ModuleType, tokenizer: PreTrainedTokenizerBase
) -> None:
    """LoRA leaves the output rows alone, so it can hardly teach a token that pretraining never showed."""

    def tokens(chats: list[list[dict[str, str]]]) -> set[int]:
        return {token for chat in chats for turn in chat for token in tokenizer.encode(turn["content"])}

    shown = tokens(list(islice(corpus.pretraining_chats(random.Random(corpus.SEED)), 6000)))
    train, test = keeper.fine_tuning_rows()
    assert tokenizer.convert_ids_to_tokens(sorted(tokens(train + test) - shown)) == []


def test_model_was_really_trained(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, measure: ModuleType, corpus: ModuleType
) -> None:
    """It knows what pretraining taught, in wordings that pretraining never showed; chance is log(vocabulary)."""
    chats = corpus.held_out_chats()
    chance = math.log(model.config.vocab_size)
    assert measure.assistant_loss(model, tokenizer, chats) < 0.05 * chance
    assert measure.exact_answers(model, tokenizer, chats[::4]) >= 0.8
    untrained = Qwen3MoeForCausalLM(model.config)
    assert measure.assistant_loss(untrained, tokenizer, chats) > 0.9 * chance


def test_the_voice_of_the_dataset_is_new_to_the_model(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, measure: ModuleType, keeper: ModuleType
) -> None:
    _, test = keeper.fine_tuning_rows()
    assert measure.assistant_loss(model, tokenizer, test) > 2.5


def test_routing_is_spread_and_matters(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, measure: ModuleType, corpus: ModuleType
) -> None:
    """Every expert of every layer has work, and its neighbour does that work far worse (a loss of 0.99, not 0.015)."""
    chats = corpus.held_out_chats()
    shares = measure.expert_shares(model, tokenizer, chats)
    assert shares.shape == (model.config.num_hidden_layers, model.config.num_experts)
    assert shares.min() > 0.02
    assert shares.max() < 0.5
    before = measure.assistant_loss(model, tokenizer, chats)
    for layer in model.model.layers:
        layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.roll(1, dims=0)
    assert measure.assistant_loss(model, tokenizer, chats) > 10 * before


def test_recipe_is_headed_by_its_command_and_points_here() -> None:
    text = (QUICKSTART / "sft.yaml").read_text()
    assert text.splitlines()[0] == "# trl sft --config configs/quickstart/sft.yaml"
    recipe = yaml.safe_load(text)
    root = QUICKSTART.parents[1]
    assert root / recipe["model_name_or_path"] == QUICKSTART / "model"
    assert root / recipe["dataset_name"] == QUICKSTART / "data"
    stock = {name for config in (SFTConfig, ModelConfig, ScriptArguments) for name in config.__dataclass_fields__}
    assert set(recipe) - stock <= {"peft_type"}
