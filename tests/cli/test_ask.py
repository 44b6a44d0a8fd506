"""`trl-moe ask`: what the base model and the adapter answer, and what is said where they cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Mistral3ForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from tests.families import randomise_factors
from tests.recipe_models import save_small
from tests.tiny_checkpoints import CHAT_TEMPLATE, VOCAB_SIZE, byte_tokenizer
from trl_moe_ext import MoeEsftConfig, MoeLoraConfig
from trl_moe_ext.cli.ask import _generation
from trl_moe_ext.cli.load_adapter import base_model_of, load_adapter, unpacked
from trl_moe_ext.cli.main import app

QUESTION = "Which way is north?"
PROMPT = f"user: {QUESTION}<eos>assistant: "
TOKENS = 6


@pytest.fixture
def base(tmp_path: Path) -> Path:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,  # far from uniform: another weight is another answer
        eos_token_id=None,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MoeLoraConfig(r=4, task_type="CAUSAL_LM"))
    randomise_factors(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def ask(*args: object, stdin: str | None = None) -> str:
    options = ["ask", *map(str, args), "--max-new-tokens", str(TOKENS)]
    result = CliRunner().invoke(app, options, input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def expected(model: nn.Module, prompt: str = PROMPT) -> str:
    """The most likely token, `TOKENS` times, without `generate`."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()


@pytest.fixture
def answers(base: Path, adapter: Path) -> Callable[..., tuple[str, str]]:
    """What the base model and the adapter should answer to a prompt."""
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    return lambda prompt=PROMPT: (expected(plain, prompt), expected(adapted, prompt))


def test_both_answers(adapter: Path, answers: Callable[..., tuple[str, str]]) -> None:
    of_base, of_adapter = answers()
    assert of_base != of_adapter
    assert ask(adapter, QUESTION) == f"Base model:\n{of_base}\n\nAdapter:\n{of_adapter}\n"


def test_an_adapter_of_moe_esft(base: Path, tmp_path: Path) -> None:
    experts = {f"model.layers.{layer}.mlp.experts": [0, 2] for layer in range(2)}
    config = MoeEsftConfig(selected_experts=experts, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path / "adapter")
    with model.disable_adapter():
        of_base = expected(model)
    assert expected(model) != of_base
    assert ask(tmp_path / "adapter", QUESTION) == f"Base model:\n{of_base}\n\nAdapter:\n{expected(model)}\n"


def test_the_adapter_alone(adapter: Path, answers: Callable[..., tuple[str, str]]) -> None:
    assert ask(adapter, QUESTION, "--adapter-only") == f"{answers()[1]}\n"


def test_each_line_of_the_standard_input_is_a_question_of_its_own(
    adapter: Path, answers: Callable[..., tuple[str, str]]
) -> None:
    questions = ("And south?", "And east?")
    both = [answers(f"user: {question}<eos>assistant: ") for question in questions]
    stdin = f"{questions[0]}\n\n  {questions[1]}  "
    assert ask(adapter, stdin=stdin) == "".join(
        f"> {question}\nBase model:\n{of_base}\n\nAdapter:\n{of_adapter}\n\n"
        for question, (of_base, of_adapter) in zip(questions, both)
    )
    assert ask(adapter, "--adapter-only", stdin=stdin) == "".join(f"{of_adapter}\n" for _, of_adapter in both)


def test_both_draw_with_the_same_seed(base: Path, tmp_path: Path) -> None:
    """An adapter that was never trained answers as the base model does, also where tokens are drawn."""
    untrained = get_peft_model(AutoModelForCausalLM.from_pretrained(base), MoeLoraConfig(task_type="CAUSAL_LM"))
    untrained.save_pretrained(tmp_path / "untrained")
    drawn = ask(tmp_path / "untrained", QUESTION, "--temperature", 2)
    of_base, of_adapter = drawn.removeprefix("Base model:\n").split("\n\nAdapter:\n")
    assert f"{of_base}\n" == of_adapter
    assert drawn != ask(tmp_path / "untrained", QUESTION)


def test_without_a_chat_template_the_text_is_completed(
    adapter: Path, base: Path, answers: Callable[..., tuple[str, str]]
) -> None:
    byte_tokenizer(chat_template=None).save_pretrained(base)
    (base / "chat_template.jinja").unlink()
    result = CliRunner().invoke(
        app, ["ask", str(adapter), QUESTION, "--adapter-only", "--max-new-tokens", str(TOKENS)]
    )
    assert result.stdout == f"{answers(QUESTION)[1]}\n"
    assert "The tokenizer has no chat template: the question is completed as plain text.\n" in result.stderr


def test_the_tokenizer_of_the_adapter_comes_first(adapter: Path) -> None:
    byte_tokenizer("{{ messages[0].content }}").save_pretrained(adapter)
    _, tokenizer = load_adapter(adapter, base_model_of(adapter), "auto", "cpu")
    assert tokenizer.chat_template == "{{ messages[0].content }}" != CHAT_TEMPLATE


def test_an_answer_ends_with_the_end_of_the_model_or_of_the_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    for ends, expected_ends in ((None, [2]), (2, [2]), (7, [2, 7]), ([7, 9], [2, 7, 9])):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ends))
        assert _generation(model, tokenizer, TOKENS, 0.0)["eos_token_id"] == expected_ends


@pytest.mark.parametrize(("dtype", "loaded"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_the_dtype_of_the_base_model(adapter: Path, base: Path, dtype: str, loaded: torch.dtype) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    model, _ = load_adapter(adapter, base_model_of(adapter), dtype, None)
    assert model.get_base_model().model.embed_tokens.weight.dtype == loaded


def test_tokens_that_training_added(adapter: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(adapter)
    model, _ = load_adapter(adapter, base_model_of(adapter), "auto", "cpu")
    assert model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE + 1


def test_a_model_that_is_in_no_auto_class_for_text(tmp_path: Path) -> None:
    """Mistral Medium is a composite; TRL trains it as the class that its configuration names."""
    save_small("mistral_medium_sft", tmp_path / "model")
    save_stock_lora(Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    model, _ = load_adapter(tmp_path / "adapter", str(tmp_path / "model"), "auto", "cpu")
    assert type(model.get_base_model()) is Mistral3ForConditionalGeneration
    assert ask(tmp_path / "adapter", QUESTION).startswith("Base model:\n")


def save_stock_lora(model: nn.Module, adapter: Path) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=r".*\.layers\..*\.[qv]_proj")
    get_peft_model(model, config).save_pretrained(adapter)


def test_a_damaged_adapter_of_stock_lora(base: Path, tmp_path: Path) -> None:
    save_stock_lora(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file} is damaged (" in refused(tmp_path / "adapter", QUESTION)


def test_experts_in_mxfp4_are_unpacked(tmp_path: Path, base: Path) -> None:
    save_small("gpt_oss_20b_sft", tmp_path / "packed")
    assert unpacked(AutoConfig.from_pretrained(tmp_path / "packed"))["quantization_config"].dequantize is True
    assert unpacked(AutoConfig.from_pretrained(base)) == {}


def test_a_relative_base_model_starts_at_the_current_directory(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit_config(adapter, base_model_name_or_path="base")
    monkeypatch.chdir(tmp_path)
    assert ask(adapter, QUESTION, "--adapter-only")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    stderr = refused(adapter, QUESTION)
    assert f"the base model base of {adapter} was not found: {tmp_path}/elsewhere/base is not a directory" in stderr
    assert f"correct base_model_name_or_path in {adapter}/adapter_config.json" in stderr


def _edit_config(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(*args: object) -> str:
    result = CliRunner().invoke(app, ["ask", *map(str, args)])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


# What is done to the adapter's directory, and what the message must say, with the way out.
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (shutil.rmtree, "{adapter} is not a directory; give the output_dir of a training run"),
    (lambda d: (d / "adapter_config.json").unlink(), "{adapter} has no adapter_config.json, so it is not an adapter;"),
    (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json is damaged (JSONDecodeError"),
    (lambda d: (d / "adapter_config.json").write_text("[]"), "adapter_config.json is damaged (TypeError"),
    (lambda d: (d / "adapter_config.json").write_text("{}"), "is damaged (KeyError('base_model_name_or_path'))"),
    (lambda d: _edit_config(d, base_model_name_or_path=None), "set base_model_name_or_path in it"),
    (lambda d: _edit_config(d, base_model_name_or_path="no/such/model"), "no/such/model of {adapter} was not found"),
    (lambda d: _edit_config(d, base_model_name_or_path=str(d)), "{adapter} of {adapter} cannot be loaded: "),
    (lambda d: _edit_config(d, task_type="SEQ_CLS"), "an adapter for SEQ_CLS, which does not answer in words"),
    (lambda d: (d / "adapter_model.safetensors").unlink(), "but no adapter_model.safetensors; give the output_dir"),
    (lambda d: (d / "adapter_model.safetensors").write_bytes(b"?" * 20), "is damaged or cut off"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_an_adapter_that_cannot_be_used(adapter: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(adapter)
    stderr = refused(adapter, QUESTION)
    assert stderr.startswith("trl-moe: error: ")
    assert message.format(adapter=adapter) in stderr


def test_the_newest_complete_checkpoint_is_suggested(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-90").mkdir(parents=True)
    shutil.copytree(adapter, run / "checkpoint-60")
    assert refused(run, QUESTION).endswith(f"did you mean {run}/checkpoint-60?")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there(adapter: Path, device: str) -> None:
    assert f"--device {device} cannot be used: " in refused(adapter, QUESTION, "--device", device)


def test_an_empty_question(adapter: Path) -> None:
    assert "the question is empty; leave it out" in refused(adapter, " ")
