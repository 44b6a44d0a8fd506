"""What a run tells its user is counted, drawn and found, not assumed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image
from rich.console import Console

from tests.families import build
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.reporting.adapted import adapted_parts, adapted_table
from trl_moe_ext.reporting.callback import RunSummaryCallback
from trl_moe_ext.reporting.loss_curve import save_loss_curve


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
