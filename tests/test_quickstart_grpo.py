"""The sums of the quickstart: right, apart from the test split, rewarded exactly, and learned by GRPO."""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.scripts.grpo import make_parser

from trl_moe_ext.cli.async_grpo_arguments import parse
from trl_moe_ext.cli.named_rewards import reward_functions

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"
RECIPE = QUICKSTART / "grpo.yaml"
RIGHT_ANSWER = "configs.quickstart.rewards.right_answer"
REWARD_BEFORE = 0.4


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.chdir(ROOT)


@pytest.fixture
def make_sums() -> ModuleType:
    return importlib.import_module("configs.quickstart.make_sums")


def rows(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / "sums" / f"{split}.jsonl").read_text().splitlines()]


def question(row: dict[str, Any]) -> str:
    [message] = row["prompt"]
    assert message["role"] == "user"
    return str(message["content"])


def test_the_data_is_what_the_script_writes(make_sums: ModuleType, tmp_path: Path) -> None:
    make_sums.write(tmp_path / "sums")
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / "sums" / name).read_bytes() == (QUICKSTART / "sums" / name).read_bytes()


def sum_of(row: dict[str, Any]) -> tuple[int, str, int]:
    """What a question asks for, whatever its wording."""
    text = question(row)
    a, b = map(int, re.findall(r"\d+", text))
    if text.startswith("Take"):
        return b, "-", a
    return a, "-" if "left" in text or " - " in text else "+", b


def test_every_answer_is_right() -> None:
    for row in rows("train") + rows("test"):
        a, sign, b = sum_of(row)
        assert row["answer"] == str(a + b if sign == "+" else a - b), question(row)


def test_no_sum_of_the_test_split_is_trained_on() -> None:
    train, test = ({sum_of(row) for row in rows(split)} for split in ("train", "test"))
    assert not train & test
    assert len(train) > 4 * len(test) > 100


def test_the_reward_is_for_the_last_number_of_an_answer() -> None:
    [reward] = reward_functions([RIGHT_ANSWER])
    texts = ["3 plus 4 is 7.", "7 plus 4 is 3.", "3 plus 4 is 17.", "7", "none", ""]
    wanted = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert reward(completions=texts, answer=["7"] * 6, prompts=[""] * 6) == wanted
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(completions=chats, answer=["7"] * 6) == wanted
    with pytest.raises(ValueError, match="shorter"):
        reward(completions=texts, answer=["7"])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_both_trainers_know_every_option_of_the_recipe() -> None:
    assert RECIPE.read_text().splitlines()[0] == "# trl-moe async-grpo --config configs/quickstart/grpo.yaml"
    recipe = yaml.safe_load(RECIPE.read_text())
    arguments = parse(["--config", str(RECIPE)])
    script, training, model, _ = make_parser(prog="trl grpo").parse_args_and_config(["--config", str(RECIPE)])
    for name, value in recipe.items():
        for parsed in ((arguments.script, arguments.training, arguments.model), (script, training, model)):
            found = [getattr(part, name) for part in parsed if hasattr(part, name)]
            assert value in found or (name, value, found) == ("report_to", "none", [[]]), name
    assert recipe["reward_funcs"] == [RIGHT_ANSWER]
    assert ROOT / recipe["dataset_name"] == QUICKSTART / "sums"


def right_share(model: Any, split: str, count: int) -> float:
    """Share of sampled answers that are rewarded."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "model", padding_side="left")
    chosen = random.Random(0).sample(rows(split), count)
    inputs = tokenizer.apply_chat_template(
        [row["prompt"] for row in chosen],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    torch.manual_seed(0)
    output = model.eval().generate(**inputs, max_new_tokens=16, do_sample=True, top_k=0, temperature=1.0)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    [reward] = reward_functions([RIGHT_ANSWER])
    rewards = reward(completions=texts, answer=[row["answer"] for row in chosen])
    return sum(rewards) / count


def test_the_model_gets_some_of_them_right_before() -> None:
    """Neither too few to learn from nor so many that there is nothing to learn."""
    model = AutoModelForCausalLM.from_pretrained(QUICKSTART / "model")
    assert right_share(model, "train", 128) == pytest.approx(REWARD_BEFORE, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["async", "sync"])
def test_the_recipe_teaches_them(trainer: str, tmp_path: Path) -> None:
    """In minutes on two cores, and to answer sums that were not trained on as well."""
    folder = Path(sys.executable).parent
    command = [folder / "trl-moe", "async-grpo"] if trainer == "async" else [folder / "trl", "grpo"]
    words = [*command, "--config", RECIPE, "--output_dir", tmp_path, "--save_strategy", "no"]
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert right_share(model, "train", 256) > REWARD_BEFORE + 0.35
    assert right_share(model, "test", len(rows("test"))) > REWARD_BEFORE + 0.3
