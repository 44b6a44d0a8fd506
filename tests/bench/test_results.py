"""Figures from made-up measurements, and every form in which they are told."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from trl_moe_ext.bench.figures import figure
from trl_moe_ext.bench.fit import Sizes
from trl_moe_ext.bench.machine import machine
from trl_moe_ext.bench.measure import Measured
from trl_moe_ext.bench.plan import Request
from trl_moe_ext.bench.plot import save_plot
from trl_moe_ext.bench.process import Missing
from trl_moe_ext.bench.results import Results, Row
from trl_moe_ext.bench.table import notes, results_tables, title

SIZES = Sizes(1, 128, 2048, 768, 8, 10**9, 9 * 10**8, 2 * 10**9, False)
FACTS: dict[str, Any] = {
    "versions": {"torch": "2.13.0"},
    "device": {"type": "cpu", "name": "A Processor", "cores": 2, "torch_threads": 2},
}


def rounds(*milliseconds: float, megabytes: float | None = None) -> list[Measured]:
    """Rounds of three steps with these medians."""
    extra = None if megabytes is None else int(megabytes * 1e6)
    return [Measured([1e-3 * ms, 9e-3 * ms, 1e-4 * ms], extra) for ms in milliseconds]


def results(tokens: tuple[int, ...] = (512,)) -> Results:
    rows = [
        row
        for count in tokens
        for row in (
            Row(count, "frozen", rounds(200 * count, 100 * count, 300 * count, megabytes=400)),
            Row(count, "moe_lora", rounds(250 * count, 240 * count, 260 * count, megabytes=300)),
            Row(count, "peft_grouped_mm", rounds(1000 * count, megabytes=2000)),
            Row(count, "peft_eager", missing=Missing("It needs about 9.9 GB, 1.0 GB are available")),
        )
    ]
    peers = ("frozen", "moe_lora", "peft_grouped_mm", "peft_eager")
    request = Request("experts", "qwen3-30b-a3b", peers, tokens, "bfloat16", 16, 3, 4, "cpu")
    errors: dict[str, dict[str, float] | Missing] = {
        "frozen": {"output": 1e-3, "dX": 2e-3},
        "moe_lora": {"output": 1e-3, "dX": 2e-3, "dA": 3e-3, "dB": 4e-3},
        "peft_grouped_mm": Missing("Its process failed: Boom", is_failure=True),
    }
    return Results(request, SIZES, rows, errors)


def printed(found: Results) -> str:
    console = Console(file=io.StringIO(), width=200, markup=False)
    for table in results_tables(found):
        console.print(table)
    return console.file.getvalue()


def cells(found: Results, peer: str) -> list[list[str]]:
    """The words in each row of a peer, in the order of the tables."""
    return [line.split() for line in printed(found).splitlines() if line.split()[:1] == [peer]]


def test_spread_and_ratios() -> None:
    found = results()
    frozen, ours = found.row(512, "frozen"), found.row(512, "moe_lora")
    assert frozen is not None
    assert ours is not None
    assert frozen.milliseconds is not None
    assert (frozen.milliseconds.low, frozen.milliseconds.median, frozen.milliseconds.high) == pytest.approx(
        (51_200, 102_400, 153_600)
    )
    assert found.ratio(ours, "frozen", "milliseconds") == pytest.approx(1.25)
    assert found.ratio(ours, "frozen", "megabytes") == pytest.approx(0.75)
    assert found.ratio(frozen, "moe_lora", "milliseconds") == pytest.approx(0.8)


def test_ratios_are_of_the_same_number_of_tokens() -> None:
    found = results((128, 512))
    found.rows[0].rounds = rounds(100)  # frozen at 128 tokens
    at_128, at_512 = found.row(128, "moe_lora"), found.row(512, "moe_lora")
    assert at_128 is not None
    assert at_512 is not None
    assert found.ratio(at_128, "frozen", "milliseconds") == pytest.approx(320)
    assert found.ratio(at_512, "frozen", "milliseconds") == pytest.approx(1.25)


def test_nothing_is_made_up_for_what_is_missing() -> None:
    found = results()
    eager, ours = found.row(512, "peft_eager"), found.row(512, "moe_lora")
    assert eager is not None
    assert ours is not None
    assert (eager.milliseconds, eager.megabytes) == (None, None)
    assert found.ratio(eager, "frozen", "milliseconds") is None
    assert found.ratio(ours, "peft_eager", "milliseconds") is None
    assert found.ratio(ours, "moe_lora_off", "milliseconds") is None
    unknown = Row(512, "moe_lora", rounds(1.0))
    assert unknown.megabytes is None


def test_the_tables() -> None:
    found = results()
    times, errors = cells(found, "moe_lora")
    assert times[1:] == ["128,000", "(122,880-133,120)", "300", "(300-300)", "1.25", "0.75", "1.00", "-"]
    assert errors[1:] == ["1.0e-03", "2.0e-03", "3.0e-03", "4.0e-03"]
    assert cells(found, "frozen")[1][1:] == ["1.0e-03", "2.0e-03", "-", "-"]
    assert cells(found, "peft_grouped_mm")[0][-2] == "4.00"
    assert cells(found, "peft_eager") == [["peft_eager", *"------"]]
    assert title(found) == "The routed experts of qwen3-30b-a3b alone: E=128 H=2048 I=768 top-8, bfloat16, r=16"


@pytest.mark.parametrize(
    ("value", "text"), [(0.123, "0.12"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346")]
)
def test_a_figure_has_three_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_the_notes() -> None:
    text = list(notes(results((128, 512)), FACTS))
    assert text[0] == "Not measured: peft_eager, 128, 512 tokens. It needs about 9.9 GB, 1.0 GB are available."
    assert text[1] == "Errors not measured: peft_grouped_mm. Its process failed: Boom."
    assert "3 rounds" in text[2]
    assert "4 steps" in text[2]
    assert "gradients of the trained parameters" in text[3]
    assert text[-1] == "A Processor, 2 cores, 2 threads of torch; torch 2.13.0."


def test_failures_are_what_should_have_worked() -> None:
    found = results()
    assert found.failures == ["gradient errors of peft_grouped_mm: Its process failed: Boom"]
    found.rows[0].missing = Missing("Its process was ended by signal 9", is_failure=True)
    assert found.failures[0] == "frozen at 512 tokens: Its process was ended by signal 9"


def test_json_has_everything() -> None:
    facts = json.loads(json.dumps(results().as_dict()))
    assert facts["command"] == (
        "trl-moe bench experts --shape qwen3-30b-a3b --tokens 512 --dtype bfloat16 --rank 16 "
        "--peers frozen,moe_lora,peft_grouped_mm,peft_eager --rounds 3 --steps 4 --device cpu"
    )
    assert facts["sizes"]["experts"] == 128
    ours, eager = facts["results"][1], facts["results"][3]
    assert [measured["seconds"][0] for measured in ours["rounds"]] == pytest.approx([128.0, 122.88, 133.12])
    assert ours["rounds"][0]["extra_bytes"] == 300_000_000
    assert ours["milliseconds"]["median"] == pytest.approx(128_000)
    assert ours["time_over_frozen"] == pytest.approx(1.25)
    assert ours["memory_over_moe_lora"] == 1.0
    assert eager["missing"] == {"reason": "It needs about 9.9 GB, 1.0 GB are available", "is_failure": False}
    assert eager["time_over_frozen"] is None
    assert facts["gradient_errors"]["moe_lora"]["dA"] == 3e-3
    assert facts["gradient_errors"]["peft_grouped_mm"]["missing"]["is_failure"]


def test_the_command_of_a_step_has_its_checkpoint() -> None:
    request = Request(
        "step", "my model", ("frozen",), (8, 16), "float32", 4, 1, 2, "cuda", gradient_checkpointing=True
    )
    assert request.command == (
        "trl-moe bench step 'my model' --tokens 8,16 --dtype float32 --rank 4 --peers frozen --rounds 1 --steps 2 "
        "--device cuda --gradient_checkpointing"
    )


@pytest.mark.parametrize("tokens", [(512,), (128, 512, 2048)], ids=["bars", "lines"])
def test_the_plot_is_a_picture(tmp_path: Path, tokens: tuple[int, ...]) -> None:
    path = tmp_path / "plot.png"
    save_plot(results(tokens), "A title", path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width > 1000
        assert image.height > 400
        # Three peers' colours at least.
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 10


def test_the_plot_of_nothing_is_still_a_picture(tmp_path: Path) -> None:
    found = results()
    for row in found.rows:
        row.rounds = []
    save_plot(found, "A title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_machine() -> None:
    facts = machine("cpu")
    assert facts["versions"].keys() == {"torch", "transformers", "peft", "trl_moe_ext", "python"}
    assert facts["device"]["name"]
    assert facts["device"]["cores"] >= 1
