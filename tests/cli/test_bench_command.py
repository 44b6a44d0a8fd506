"""`trl-moe bench`: what reaches the measurements, what is printed, and how each failure ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner, Result

from tests.bench.tiny import TINY, add_tiny_shapes, stay_in_this_process
from trl_moe_ext.bench import fit
from trl_moe_ext.bench.peers import DEFAULT_PEERS, PEERS
from trl_moe_ext.bench.process import Missing
from trl_moe_ext.bench.shapes import SHAPES
from trl_moe_ext.cli import bench_options
from trl_moe_ext.cli.main import app
from trl_moe_ext.kernels.experts_mlp import experts_mlp
from trl_moe_ext.kernels.registry import Kernel
from trl_moe_ext.plugins import host

QUICK = ("--rounds", "1", "--steps", "1", "--dtype", "float32", "--device", "cpu")


def bench(*args: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, args)], catch_exceptions=False)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    add_tiny_shapes(monkeypatch)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    stay_in_this_process(monkeypatch)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    sizes = {**TINY["tiny-qwen3"].sizes, "vocab_size": 97, "num_hidden_layers": 2}
    path = tmp_path / "checkpoint"
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).save_pretrained(path)
    return path


def test_alone_it_shows_its_help() -> None:
    result = bench()
    assert result.exit_code == 0
    for word in ("experts", "layer", "step", "--check"):
        assert word in result.output


def test_the_names_in_the_help_are_those_that_there_are() -> None:
    assert set(bench_options.SHAPES.split(", ")) == SHAPES.keys() - TINY.keys()
    assert tuple(bench_options.DEFAULT_PEERS.split(",")) == DEFAULT_PEERS
    text = bench("experts", "--help").output
    assert all(name in text for name in (*SHAPES.keys() - TINY.keys(), *PEERS))
    words = " ".join(text.replace("│", " ").split())
    assert "takes minutes" in words
    assert f"[default: ({', '.join(DEFAULT_PEERS)})]" in words


def test_experts(in_this_process: None, tmp_path: Path) -> None:
    paths = tmp_path / "bench.json", tmp_path / "bench.png"
    options = ("--json", paths[0], "--plot", paths[1], "--tokens", "8,16", "--rank", 4, "--peers", "frozen,moe_lora")
    result = bench("experts", "--shape", "tiny-qwen3", *options, *QUICK)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "The routed experts of tiny-qwen3 alone: E=6 H=64 I=48 top-2, float32, r=4"
    assert [line.strip() for line in lines if "tokens" in line and line.strip()[0].isdigit()] == [
        "8 tokens",
        "16 tokens",
    ]
    assert sum(line.split()[:1] == ["moe_lora"] for line in lines) == 3  # two tables of time, one of errors
    assert "round 1 of 1, 16 tokens, moe_lora: " in result.stderr
    facts = json.loads(paths[0].read_text())
    assert [(row["tokens"], row["peer"]) for row in facts["results"]] == [
        *((8, "frozen"), (8, "moe_lora"), (16, "frozen"), (16, "moe_lora"))
    ]
    assert facts["rank"] == 4
    assert facts["gradient_errors"]["moe_lora"]["dB"] < 1e-5
    assert facts["device"]["type"] == "cpu"
    assert {"torch", "transformers", "peft"} <= facts["versions"].keys()
    with Image.open(paths[1]) as image:
        assert image.width > 1000


def test_layer_prints_json_alone(in_this_process: None) -> None:
    result = bench("layer", "--shape", "tiny-llama4", "--tokens", 8, "--json", "-", *QUICK)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [row["peer"] for row in rows] == list(DEFAULT_PEERS)
    assert "have one implementation" in rows[-1]["missing"]["reason"]
    assert all(row["milliseconds"]["median"] > 0 for row in rows[:-1])


@pytest.mark.parametrize("flag", [(), ("--no-gradient_checkpointing",)])
def test_step(in_this_process: None, checkpoint: Path, flag: tuple[str, ...]) -> None:
    result = bench("step", checkpoint, "--tokens", 8, "--peers", "frozen,moe_lora,peft_grouped_mm", *flag, *QUICK)
    assert result.exit_code == 0, result.output
    checkpointing = "" if flag else ", gradient checkpointing"
    assert result.stdout.splitlines()[0] == (
        f"A training step of {checkpoint}: E=6 H=64 I=48 top-2, float32, r=16{checkpointing}"
    )
    for peer in ("frozen", "moe_lora", "peft_grouped_mm"):
        assert any(line.split()[:1] == [peer] for line in result.stdout.splitlines())


def test_step_in_processes_of_its_own(checkpoint: Path) -> None:
    result = bench("step", checkpoint / "config.json", "--tokens", 8, "--peers", "moe_lora", "--json", "-", *QUICK)
    assert result.exit_code == 0, result.output
    [row] = json.loads(result.stdout)["results"]
    assert len(row["rounds"]) == 1
    assert row["milliseconds"]["median"] > 0


def test_a_checkpoint_without_experts(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    result = bench("step", tmp_path, *QUICK)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith(f"{tmp_path} has no routed experts: its peers would all be the same\n")


def test_what_does_not_fit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "available_bytes", lambda device: 22 * 10**9)
    result = bench("experts", "--shape", "llama4-maverick")
    assert result.exit_code == 2
    assert result.stderr.startswith("trl-moe: error: llama4-maverick in bfloat16 needs about 3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "mixtral"], "there is no shape 'mixtral'; did you mean mixtral-8x7b?"),
        (["--peers", "frozen,peft"], "there is no peer 'peft'; "),
        (["--peers", ","], "--peers names none; give at least one"),
        (["--tokens", "128,many"], "--tokens '128,many' is not a list of numbers above zero, such as 128,512,2048"),
        (["--tokens", "0"], "--tokens '0' is not a list of numbers above zero"),
        (["--device", "gpu"], "'gpu' is not a device of torch; use cpu, cuda, or cuda:1"),
        (["--device", "cuda:99"], "there is no cuda:99 here: torch sees "),
        (["--device", "meta"], "memory is measured on cpu and cuda only, not on meta"),
        (["--json", "missing/bench.json"], "is not a directory: missing/bench.json cannot be written"),
        (["--plot", "/"], "/ is a directory; give the name of a file"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str) -> None:
    result = bench("experts", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("trl-moe: error: ")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_failed_measurement_is_told_and_the_rest_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_moe_ext.bench import process

    def run(task: str, plan: Any) -> dict[str, Any] | Missing:
        if plan.peer == "frozen":
            return Missing("Its process was ended by signal 9", is_failure=True)
        return {"seconds": [0.5], "extra_bytes": 10**6}

    monkeypatch.setattr(process, "_run", run)
    result = bench("layer", "--shape", "tiny-qwen3", "--peers", "frozen,moe_lora", *QUICK)
    assert result.exit_code == 1
    assert "Not measured: frozen, 512 tokens. Its process was ended by signal 9." in result.stdout
    assert ["moe_lora", "500", "(500-500)", "1.00", "(1.00-1.00)", "-", "-", "1.00", "-"] in map(
        str.split, result.stdout.splitlines()
    )
    assert result.stderr.splitlines()[-1] == (
        "trl-moe: error: frozen at 512 tokens: Its process was ended by signal 9"
    )


def test_check_passes() -> None:
    result = bench("--check")
    assert result.exit_code == 0
    kernels = [name for name in host().records("register_kernels") if name != "reference"]
    rows = [line.split() for line in result.stdout.splitlines() if line.split()[:1] and line.split()[0] in kernels]
    assert [(row[0], row[1], row[4]) for row in rows] == [
        (k, d, "ok") for k in kernels for d in ("float32", "bfloat16")
    ]


def test_check_fails_for_a_wrong_kernel_of_a_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        return 1.1 * experts_mlp(*args, **kwargs)

    records = {**host().records("register_kernels"), "wrong": Kernel("wrong", "a plug-in's", wrong)}
    monkeypatch.setattr(host(), "records", lambda hook: records)
    result = bench("--check")
    assert result.exit_code == 1
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if "float32" in line}
    assert "DIFFERS" in rows["wrong"]
    assert "ok" in rows["grouped"]


def test_check_stands_alone() -> None:
    result = bench("--check", "layer")
    assert result.exit_code == 2
    assert result.stderr == "trl-moe: error: --check stands alone: leave out it or 'layer'\n"
