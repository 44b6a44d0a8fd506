"""`trl-moe inspect`: where the configuration comes from, what is printed, and how each failure ends."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import Llama4Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig
from typer.testing import CliRunner, Result

from trl_moe_ext.cli.build_model import build_on_meta
from trl_moe_ext.cli.main import app
from trl_moe_ext.experts.census import tiny_config
from trl_moe_ext.reporting.inspection import Inspection
from trl_moe_ext.reporting.inspection.unread import UnreadExperts

DOCS = Path(__file__).parents[2] / "docs" / "inspect.md"

# A model that comes with its code, whose experts are laid out as no other's: one matrix for all of them, and a forward
# that nothing else has.
ODD_CONFIGURATION = """
from transformers import PreTrainedConfig

class OddConfig(PreTrainedConfig):
    model_type = "odd_moe"
    hidden_size: int = 8
"""
ODD_MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from .configuration_odd import OddConfig

class OddExperts(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(4 * hidden, hidden))

    def forward(self, tokens, plan):
        return tokens

class OddLayer(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(hidden, hidden)})
        self.experts = OddExperts(hidden)

class OddForCausalLM(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList([OddLayer(config.hidden_size) for _ in range(3)])
        self.post_init()

    def forward(self, input_ids):
        return input_ids
"""


def inspect(*args: object) -> Result:
    return CliRunner().invoke(app, ["inspect", *map(str, args)], catch_exceptions=False)


def output_of(*args: object) -> str:
    result = inspect(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def facts_of(*args: object) -> dict[str, Any]:
    return json.loads(output_of(*args, "--json"))


def refused(*args: object) -> str:
    result = inspect(*args)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return result.stderr.splitlines()[-1]


def save(model_type: str, directory: Path, **overrides: Any) -> Path:
    tiny_config(model_type, **overrides).save_pretrained(directory)
    return directory


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return save("qwen3_moe", tmp_path / "qwen")


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Code that comes with a model is copied to a cache and imported from there.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    directory = tmp_path / "odd"
    directory.mkdir()
    (directory / "configuration_odd.py").write_text(ODD_CONFIGURATION)
    (directory / "modeling_odd.py").write_text(ODD_MODELING)
    auto_map = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (directory / "config.json").write_text(json.dumps({"model_type": "odd_moe", "auto_map": auto_map}))
    return directory


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the output that of a terminal with so many columns."""

    def of_width(columns: int) -> None:
        for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": str(columns)}.items():
            monkeypatch.setenv(name, value)

    return of_width


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# -- where the configuration comes from ------------------------------------------------------------------------------


def test_a_directory_and_its_config_are_the_same_model(qwen: Path) -> None:
    of_directory, of_file = facts_of(qwen), facts_of(qwen / "config.json")
    assert of_file.pop("model") == str(qwen / "config.json")
    assert of_directory.pop("model") == str(qwen)
    assert of_file == of_directory


def test_no_weights_are_made() -> None:
    model = build_on_meta(Qwen3MoeConfig(num_hidden_layers=94))
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} <= {"meta", "cpu"}
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(b.numel() for b in model.buffers() if b.device.type == "cpu") < 10**4


def test_the_class_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    directory = save("llama", tmp_path)
    assert facts_of(directory)["model_class"] == "LlamaForCausalLM"
    config = LlamaConfig.from_pretrained(directory, architectures=["LlamaForSequenceClassification"])
    config.save_pretrained(directory)
    assert facts_of(directory)["model_class"] == "LlamaForSequenceClassification"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "has no config.json that can be read"),
        ('{"hidden_size": 8}', "has no model_type"),
        ('{"model_type": "qwen3_mo"}', "did you mean qwen3_moe"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is refused by its class: "),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    stderr = refused(tmp_path)
    assert stderr.startswith("trl-moe: error: ")
    assert message in stderr


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    assert f"{tmp_path} has no config.json" in refused(tmp_path)


def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    stderr = refused("no/such-model")
    assert f"no configuration of no/such-model: {tmp_path}/no/such-model does not exist" in stderr
    assert "HF_HUB_OFFLINE is set" in stderr
    assert "without a network, download its config.json first" in stderr


def test_a_model_that_cannot_be_built(tmp_path: Path) -> None:
    directory = save("llama", tmp_path)
    LlamaConfig.from_pretrained(directory, hidden_act="no_such_function").save_pretrained(directory)
    assert "the model of type 'llama' cannot be built from its config.json: KeyError: 'no_such" in refused(directory)


def test_ranks_below_one(qwen: Path) -> None:
    for option in ("--r", "--expert_r"):
        assert inspect(qwen, option, "0").exit_code == 2


# -- what is printed -------------------------------------------------------------------------------------------------


def test_the_report_of_a_mixture_of_experts(tmp_path: Path) -> None:
    lines = [" ".join(line.split()) for line in output_of(save("deepseek_v3", tmp_path / "model")).splitlines()]
    assert "DeepseekV3ForCausalLM (deepseek_v3)" in lines
    for line in (
        "layers 2 in model.layers",
        "Routed experts: mlp.experts",
        "layers 1 of 2: 1",
        "experts a layer 8",
        "chosen for a token 2",
        "shared experts mlp.shared_experts",
        "router DeepseekV3TopkRouter; scores: sigmoid; with correction bias",
        "layout gate and up in one stack, in two halves",
        "read from transformers' experts interface",
        "What each moe_target trains, r=16",
    ):
        assert line in lines
    [row] = [line.split() for line in lines if line.startswith("experts attention (default)")]
    [size] = [size for size in facts_of(tmp_path / "model")["adapters"] if len(size["moe_target"]) > 1]
    assert row[3:5] == [str(size["modules"]), f"{size['parameters']:,}"]


EXAMPLES: dict[str, Callable[[], PreTrainedConfig]] = {
    "Qwen3-30B-A3B": lambda: Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    "Llama-4-Scout": Llama4Config,  # its defaults
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_the_docs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: Callable[[int], None]
) -> None:
    terminal(80)
    monkeypatch.chdir(tmp_path)
    EXAMPLES[name]().save_pretrained(name)
    shown = [line.rstrip() for line in plain(output_of(name)).splitlines()]
    assert "\n".join([f"$ trl-moe inspect {name}", *shown]) in DOCS.read_text()


def test_a_word_with_nothing_in_the_model_shows_a_dash(qwen: Path) -> None:
    [row] = [line.split() for line in output_of(qwen).splitlines() if "shared_experts" in line]
    assert row == ["shared_experts", "-", "-", "-", "-"]


def test_a_composite(tmp_path: Path) -> None:
    lines = [" ".join(line.split()) for line in output_of(save("qwen3_vl_moe", tmp_path)).splitlines()]
    assert any(line.startswith("adapted by default model.language_model (Qwen3VLMoeTextModel), ") for line in lines)
    [tower] = [line for line in lines if line.startswith("other modalities")]
    assert tower.startswith("other modalities model.visual (Qwen3VLMoeVisionModel), ")
    assert tower.endswith(", not adapted by default")


def test_a_dense_model(tmp_path: Path) -> None:
    text = output_of(save("llama", tmp_path))
    assert "none: moe_lora trains ordinary LoRA, and experts means the dense MLP" in text
    assert "Routed experts:" not in text


def test_a_quantised_checkpoint(qwen: Path) -> None:
    config = json.loads((qwen / "config.json").read_text())
    (qwen / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    assert facts_of(qwen)["stored_quantised"] == "fp8"
    assert "fp8: load it dequantised" in output_of(qwen)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4", "jetmoe"])
def test_a_terminal_gets_whole_words_and_no_line_that_is_too_long(
    tmp_path: Path, columns: int, model_type: str, terminal: Callable[[int], None]
) -> None:
    directory = save(model_type, tmp_path)
    in_a_pipe = output_of(directory).partition("To train")[0]
    terminal(columns)
    report = plain(output_of(directory)).partition("To train")[0]
    assert max(len(line.rstrip()) for line in report.splitlines()) <= columns
    # Only the rule of the table is as wide as it has room.
    assert report.replace("─", "").split() == in_a_pipe.replace("─", "").split()


# -- the command that comes next -------------------------------------------------------------------------------------


def test_the_command_is_one_that_trl_takes(qwen: Path) -> None:
    text = output_of(qwen, "--r", 5, "--expert_r", 3)
    command = shlex.split(text.partition("To train the default:\n")[2].replace("\\\n", " "))
    assert command == shlex.split(facts_of(qwen, "--r", 5, "--expert_r", 3)["command"])
    assert command[:2] == ["trl", "sft"]
    parser = importlib.import_module("trl.scripts.sft").make_parser(prog="trl sft")
    arguments = vars(parser.parse_args(command[2:]))
    chosen = {"model_name_or_path": str(qwen), "peft_type": "moe_lora", "lora_r": 5, "moe_expert_r": 3}
    assert {name: arguments[name] for name in chosen} == chosen


@pytest.mark.parametrize("model_type", ["switch_transformers", "vitpose_backbone"])
def test_what_trl_does_not_train_gets_the_way_in_python(tmp_path: Path, model_type: str) -> None:
    directory = save(model_type, tmp_path)
    assert facts_of(directory)["command"] is None
    assert "get_peft_model(model, MoeLoraConfig(r=4))" in output_of(directory, "--r", 4)


# -- JSON ------------------------------------------------------------------------------------------------------------


def test_json_has_the_keys_of_the_docs(tmp_path: Path) -> None:
    facts = facts_of(save("qwen3_vl_moe", tmp_path))
    assert list(facts) == ["model", *(f.name for f in fields(Inspection)), "command"]
    page = DOCS.read_text()
    [experts] = facts["experts"]
    inner = {*experts, *experts["router"], *facts["adapters"][0], *facts["text_models"][0]}
    for key in {*facts, *inner, *(f.name for f in fields(UnreadExperts))}:
        assert re.fullmatch("[a-z][a-z0-9_]*", key)
        assert f"`{key}`" in page, key


def test_ranks_reach_the_adapters(qwen: Path) -> None:
    def experts(*args: object) -> int:
        return facts_of(qwen, *args)["adapters"][0]["parameters"]

    assert experts("--r", 8) == 2 * experts("--r", 4)
    assert experts("--r", 8, "--expert_r", 4) == experts("--r", 4)


# -- experts that cannot be read, and code that comes with a model ----------------------------------------------------


def test_code_of_the_model_is_run_only_when_asked(odd: Path) -> None:
    stderr = refused(odd)
    assert "is of type 'odd_moe', which needs the code that comes with it" in stderr
    assert "--trust_remote_code" in stderr


def test_experts_that_cannot_be_read_are_described(odd: Path) -> None:
    result = inspect(odd, "--trust_remote_code")
    assert result.exit_code == 1
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "OddForCausalLM (odd_moe)",
        "Experts that cannot be read: layers.0.experts",
        "class OddExperts, 3 in the model",
        "parameters kernel (32, 8)",
        "called as forward(tokens, plan)",
        "missing no flags of transformers' experts interface",
    ):
        assert line in lines
    assert any(line.startswith("missing no record knows it; asked: llama4, ") for line in lines)
    assert any(
        line.startswith("missing names and shapes need stacks") and line.endswith("no stacks") for line in lines
    )
    assert "experts cannot be read - - -" in lines
    assert "register_experts_families, see docs/families.md" in result.stdout
    # What the model has besides can be adapted.
    [attention] = [line.split() for line in lines if line.startswith("attention ")]
    assert attention[1:3] == ["3", f"{3 * 16 * (8 + 8)}"]


def test_experts_that_cannot_be_read_in_json(odd: Path) -> None:
    result = inspect(odd, "--trust_remote_code", "--json")
    assert result.exit_code == 1
    facts = json.loads(result.stdout)
    assert facts["command"] is None
    assert facts["active_parameters"] is None
    assert facts["has_routed_experts"] is True
    [unread] = facts["unread_experts"]
    assert unread.pop("missing")
    assert unread == {
        "name": "layers.0.experts",
        "occurrences": 3,
        "class_name": "OddExperts",
        "parameters": {"kernel": [32, 8]},
        "forward": "forward(tokens, plan)",
    }
    assert [size["moe_target"] for size in facts["adapters"] if size["parameters"]] == [["attention"]]
