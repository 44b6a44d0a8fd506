"""The recipes in `configs/`: TRL takes every key, the figures are true, and each trains a small model of its kind."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import get_peft_config
from trl.scripts import sft

from tests.recipe_models import full_size, save_small
from trl_moe_ext.reporting.adapted import adapted_parts

# TRL turns on what transformers has since renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    # What moe_lora says of the dense Mistral Medium.
    pytest.mark.filterwarnings("ignore:.* has no routed experts. moe_lora trains ordinary LoRA:UserWarning"),
]

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
README = (CONFIGS / "README.md").read_text()
# A parse checks whether this machine can compute in bf16.
ON_CPU = ("--use_cpu", "true", "--bf16", "false", "--dtype", "float32")


@dataclass
class Sizes:
    """What the meta device tells of a recipe: parameters of the model and of its adapter, and the adapted parts."""

    weights: int
    adapter: int
    parts: list[str]
    vision: int


@pytest.fixture(scope="module", params=RECIPES)
def sized(request: pytest.FixtureRequest) -> tuple[str, Sizes]:
    model = full_size(request.param)
    weights = sum(p.numel() for p in model.parameters())
    with torch.device("meta"):
        adapted = get_peft_model(model, get_peft_config(parse(request.param)[2]))
    parts = adapted_parts(adapted)
    return request.param, Sizes(
        weights=weights,
        adapter=sum(part.parameters for part in parts),
        parts=[part.part for part in parts if part.parameters],
        vision=sum(p.requires_grad for name, p in adapted.named_parameters() if "vision" in name),
    )


def parse(recipe: str, *overrides: str) -> Any:
    """Parsed arguments of the script, as it parses them itself; the last item is what it did not know."""
    arguments = ["--config", str(CONFIGS / f"{recipe}.yaml"), *ON_CPU, *overrides]
    return sft.make_parser().parse_args_and_config(arguments, return_remaining_strings=True)


def gb(parameters: int, digits: int) -> str:
    return f"{2 * parameters / 1e9:.{digits}f} GB"


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_is_known(recipe: str) -> None:
    *_, unknown = parse(recipe)
    assert unknown == []


def test_an_unknown_key_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CONFIGS / f"{RECIPES[0]}.yaml").read_text()
    (tmp_path / "misspelt.yaml").write_text(text + "lerning_rate: 1.0\n")
    monkeypatch.setattr("tests.test_recipes.CONFIGS", tmp_path)
    assert parse("misspelt")[-1] == ["--lerning_rate", "1.0"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_is_at_the_top(recipe: str) -> None:
    lines = (CONFIGS / f"{recipe}.yaml").read_text().splitlines()
    command = next(line for line in lines if line.startswith("# trl "))
    assert command.removesuffix(" --num_processes 1") == f"# trl sft --config configs/{recipe}.yaml"
    assert lines.index(command) <= 1


def test_the_figures_at_the_top_are_true(sized: tuple[str, Sizes]) -> None:
    recipe, sizes = sized
    assert (
        f"# Computed from the shapes, in bf16: weights {gb(sizes.weights, 1)} ({sizes.weights:,} parameters), "
        f"adapter {gb(sizes.adapter, 2)} ({sizes.adapter:,})."
    ) in (CONFIGS / f"{recipe}.yaml").read_text().splitlines()


def test_the_readme_lists_the_recipe_with_its_figures(sized: tuple[str, Sizes]) -> None:
    recipe, sizes = sized
    row = (
        f"[`{recipe}.yaml`]({recipe}.yaml)",
        f"`{parse(recipe)[2].model_name_or_path}`",
        ", ".join(sizes.parts),
        f"{sizes.adapter:,}",
        gb(sizes.weights, 1),
        gb(sizes.adapter, 2),
    )
    assert f"| {' | '.join(row)} |" in README.splitlines()


def test_no_vision_tower_is_adapted(sized: tuple[str, Sizes]) -> None:
    """A data set of texts would leave an adapter there untrained."""
    assert sized[1].vision == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The processors of models that see images need torchvision. Of a processor, texts need only its tokenizer.
    monkeypatch.setattr("trl.trainer.sft_trainer.AutoProcessor", AutoTokenizer)
    save_small(recipe, tmp_path / "model")
    out = tmp_path / "out"
    paths = ("--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(out))
    data = ("--dataset_name", str(write_chats(tmp_path / "data")), "--max_length", "1024")
    steps = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1")
    *arguments, _ = parse(recipe, *paths, *data, *steps)
    sft.main(*arguments)
    trained = load_file(out / "adapter_model.safetensors")
    ups = {name: tensor for name, tensor in trained.items() if ".lora_B." in name}
    # They start at zero, and only training moves them.
    assert [name for name, tensor in ups.items() if not tensor.any()] == []
    # Arguments of stock LoRA come back from the parser as TRL's own, without our option.
    asked_for = getattr(arguments[2], "peft_type", "lora")
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == asked_for.upper()


def test_the_copy_of_gpt_oss_in_bf16(tmp_path: Path) -> None:
    """The code in the README writes a checkpoint whose experts the recipe's adapter takes."""
    published, copy = tmp_path / "published", tmp_path / "copy"
    save_small("gpt_oss_20b_sft", published)
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {'"openai/gpt-oss-20b"': published, '"gpt-oss-20b-bf16"': copy}
    assert all(code.count(name) == 1 for name in names)
    for name, path in names.items():
        code = code.replace(name, repr(str(path)))
    exec(code, {})
    assert not hasattr(AutoConfig.from_pretrained(copy), "quantization_config")
    stored = load_file(copy / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(copy)
    adapted = get_peft_model(model, get_peft_config(parse("gpt_oss_20b_sft")[2]))
    assert [part.part for part in adapted_parts(adapted) if part.parameters] == ["routed experts", "attention"]


def write_chats(directory: Path) -> Path:
    directory.mkdir()
    for split in ("train", "test"):
        chats = [
            {"messages": [{"role": "user", "content": f"And {n}?"}, {"role": "assistant", "content": f"{n} is even."}]}
            for n in range(0, 16, 2)
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return directory
