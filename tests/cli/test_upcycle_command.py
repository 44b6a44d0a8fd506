"""`trl-moe upcycle`: every option reaches the conversion, and the report is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from trl_moe_ext.cli.main import app


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def run(*args: object) -> str:
    result = CliRunner().invoke(app, ["upcycle", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_report(dense: Path, tmp_path: Path) -> None:
    lines = run(dense, tmp_path / "moe").splitlines()
    assert lines[0] == "llama -> mixtral: 2 layers of 4 experts, top-2, float32"
    # Embedding and head, attention, norms; then the MLPs and the routers of two layers.
    rest, mlps, routers = 2 * 61 * 32 + 2 * 4 * 32 * 32 + 5 * 32, 2 * 3 * 32 * 40, 2 * 4 * 32
    assert lines[1] == (
        f"parameters: {rest + mlps:,} dense -> {rest + 4 * mlps + routers:,}, "
        f"{rest + 2 * mlps + routers:,} active for a token"
    )
    assert re.fullmatch(r"largest difference of logits in fp32: \d\.\de-\d\d \(tolerance 1e-03\)", lines[2])
    assert lines[3] == f"written to {tmp_path / 'moe'}"


def test_every_option_arrives(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    options = ["--num-experts", 3, "--top-k", 1, "--noise", 0.5, "--dtype", "bfloat16", "--seed", 7, "--overwrite"]
    run(dense, out)
    lines = run(dense, out, *options).splitlines()
    assert lines[0] == "llama -> mixtral: 2 layers of 3 experts, top-1, bfloat16"
    assert lines[2].endswith("(expected with --noise)")
    with safe_open(out / "model.safetensors", "pt") as weights:
        gate = weights.get_tensor("model.layers.0.block_sparse_moe.gate.weight")
    expected = 0.02 * torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(7))
    assert torch.equal(gate, expected[0].to(torch.bfloat16))


def test_a_gguf_file_is_read(dense: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["upcycle", str(dense), str(tmp_path / "moe"), "--gguf-file", "none.gguf"])
    assert result.exit_code == 2
    assert result.stderr == f"trl-moe: error: {dense} has no none.gguf\n"
