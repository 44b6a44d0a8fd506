"""What a run tells its user is counted, drawn and found, not assumed."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from rich.console import Console

from tests.families import build
from trl_moe_ext import MoeEsftConfig, MoeLoraConfig
from trl_moe_ext.reporting.adapted import adapted_parts, adapted_table
from trl_moe_ext.reporting.callback import RunSummaryCallback
from trl_moe_ext.reporting.loss_curve import save_loss_curve
from trl_moe_ext.reporting.page.run_files import RunFiles
from trl_moe_ext.reporting.page.sections.adapted import section
from trl_moe_ext.reporting.run_facts import settings
from trl_moe_ext.reporting.run_record import RECORD_FILE, RunRecord, TrainedPart
from trl_moe_ext.router.history import RouterHistory


@pytest.mark.parametrize(
    ("model_type", "options", "nonzero"),
    [
        ("qwen3_moe", {}, {"routed experts", "attention"}),
        ("deepseek_v3", {"moe_target": ["shared_experts", "dense_mlp"]}, {"shared experts", "dense MLP"}),
        ("qwen3_moe", {"moe_target": ["router"]}, {"router"}),
        ("gemma4_text", {"moe_target": ["experts", "router"]}, {"routed experts", "router"}),
        ("qwen3_moe", {"modules_to_save": ["lm_head"]}, {"routed experts", "attention", "trained in full"}),
    ],
)
def test_parts_add_up_to_all_trainable_parameters(model_type, options, nonzero):
    model = get_peft_model(build(model_type), MoeLoraConfig(r=3, **options))
    rows = adapted_parts(model)
    assert {row.part for row in rows if row.parameters} == nonzero
    assert sum(row.parameters for row in rows) == model.get_nb_trainable_parameters()[0]


def test_a_stock_adapter_is_counted_as_well():
    rows = adapted_parts(get_peft_model(build("qwen3_moe"), LoraConfig(target_modules=["q_proj", "lm_head"])))
    assert {row.part for row in rows if row.parameters} == {"attention", "other Linears"}


def test_the_table_shows_the_share_of_all_parameters():
    console = Console(width=80, record=True)
    console.print(adapted_table(get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3))))
    assert "parameters (" in console.export_text()


def experts_of(model):
    return [name for name, _ in model.named_modules() if name.endswith(".experts")]


def selecting(model, *choices):
    """Options that choose experts of one layer after the other."""
    return {"selected_experts": dict(zip(experts_of(model), choices, strict=True))}


@pytest.mark.parametrize(
    ("choices", "patterns", "words"),
    [
        (([1, 2], [0, 5]), {}, "2 of 8 in each layer (25%)"),
        (([1, 2], [0, 5, 6, 7]), {}, "2 to 4 of 8 in each layer (38%)"),
        (([1, 2], [0, 5]), {r"layers\.0\.mlp\.experts\.2": 12}, "2 of 8 in each layer (25%), ranks 3 to 12"),
        (([*range(8)], [*range(8)]), {r"layers\.0\.mlp\.experts\.2": 12}, "ranks 3 to 12"),
        (([*range(8)], [*range(8)]), {}, ""),
    ],
)
def test_the_chosen_experts_and_their_ranks_are_told(choices, patterns, words):
    model = build("qwen3_moe")
    options = selecting(model, *choices)
    model = get_peft_model(model, MoeLoraConfig(r=3, moe_target=["experts"], rank_pattern=patterns, **options))
    part = next(row for row in adapted_parts(model) if row.part == "routed experts")
    assert part.detail == words
    assert part.parameters == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("make", [lambda **o: MoeLoraConfig(r=3, **o), MoeEsftConfig], ids=["moe_lora", "moe_esft"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "switch_transformers"])
def test_the_table_and_the_page_tell_the_chosen_experts(make, model_type, tmp_path):
    """Also of experts that are Linears of their own."""
    model = build(model_type)
    options = selecting(model, [1], [6])
    model = get_peft_model(model, make(moe_target=["experts"], **options))
    console = Console(width=80, record=True)
    console.print(adapted_table(model))
    lines = [line.strip() for line in console.export_text().splitlines()]
    assert "routed experts: 1 of 8 in each layer (12%)" in lines
    RunRecord(adapted=[TrainedPart(**asdict(part)) for part in adapted_parts(model)], total_parameters=10**6).save(
        tmp_path
    )
    page = section(RunFiles("run", RunRecord.load(tmp_path / RECORD_FILE), RouterHistory()))
    assert page.summary.endswith("Of the routed experts: 1 of 8 in each layer (12%).")


def test_long_options_of_an_adapter_are_told_in_short():
    model = build("qwen3_moe")
    model = get_peft_model(model, MoeLoraConfig(r=3, **selecting(model, [1, 2], [0, 5])))
    assert (
        settings(model, SimpleNamespace())["adapter"]["selected_experts"]
        == model.peft_config["default"].selected_experts
    )
    model.peft_config["default"].selected_experts = {f"layers.{n}.experts": [*range(16)] for n in range(48)}
    assert settings(model, SimpleNamespace())["adapter"]["selected_experts"] == "48 entries"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_curve_is_a_picture_also_of_negative_losses(tmp_path, sign):
    history = [{"step": n, "loss": sign / (n + 1)} for n in range(5)] + [{"step": 4, "eval_loss": sign * 0.3}]
    assert save_loss_curve(history, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (840, 480)


def test_no_loss_no_picture(tmp_path):
    assert not save_loss_curve([{"step": 1, "reward": 2.0}], tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_the_last_word_says_where_the_adapter_is_or_that_there_is_none(tmp_path, monkeypatch):
    later = []
    monkeypatch.setattr("trl_moe_ext.reporting.callback.atexit.register", later.append)
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3))
    state = SimpleNamespace(
        is_world_process_zero=True, log_history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    )
    callback = RunSummaryCallback()
    callback.console = Console(width=120, record=True, soft_wrap=True)
    callback.on_train_end(SimpleNamespace(output_dir=str(tmp_path)), state, None, model=model)
    later[0]()
    printed = callback.console.export_text()
    assert "was not saved" in printed
    model.save_pretrained(tmp_path)
    later[0]()
    printed = callback.console.export_text()
    assert "training loss 2.000 -> 1.000" in printed
    assert str(tmp_path / "adapter_model.safetensors") in printed
    assert "trl-moe ask" in printed


def test_other_processes_print_nothing(capsys):
    RunSummaryCallback().on_train_begin(None, SimpleNamespace(is_world_process_zero=False), None, model=None)
    assert capsys.readouterr().out == ""
