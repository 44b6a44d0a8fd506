"""docs/families.md is true: its record reads what it says, and its table is that of the census."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.experts.stacked import EXPERTS, HIDDEN, UpBeforeGate
from tests.families import COMPOSITES, FAMILIES
from tests.tolerances import assert_output_close
from trl_moe_ext import MoeLoraConfig, plugins
from trl_moe_ext.experts.census.report import report_type
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts

DOCUMENT = (Path(__file__).parents[2] / "docs" / "families.md").read_text()


def test_the_documented_record_reads_its_family(monkeypatch):
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    namespace: dict = {}
    exec(compile(code, "families.md", "exec"), namespace)
    [record] = namespace["register_experts_families"]()
    host = plugins.host()
    monkeypatch.setattr(host, "records", lambda hook, known=host.records: known(hook) | {record.name: record})

    experts = UpBeforeGate()
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(6)])
    arguments = torch.randn(6, HIDDEN), index, torch.rand(6, 2)
    expected = experts(*arguments)
    layer = MoeLoraExperts(experts, "default", MoeLoraConfig(r=2), r=2, lora_alpha=2)
    assert layer.layout.read_from == "up_before_gate"
    assert_output_close(layer(*arguments), expected, torch.float32)


ROWS = {
    "interface": "flags of the interface",
    "structure": "names and shapes",
    "record": "ordinary LoRA",
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_type_stands_in_the_row_that_the_census_gives_it(model_type):
    report = report_type(model_type, checks={})
    row = "ordinary LoRA" if report.experts == "Linears" else ROWS.get(report.read_from, "a record of their own")
    [line] = [line for line in DOCUMENT.splitlines() if line.startswith(f"| {row}")]
    assert re.search(rf"(?<![\w-]){model_type}(?![\w-])", line)


def test_every_composite_is_named():
    paragraph = re.search(r"\*\*25 of the 26 composite.*?\n\n", DOCUMENT, flags=re.DOTALL)[0]
    assert [t for t in COMPOSITES if not re.search(rf"(?<!\w){t}(?!\w)", paragraph)] == []
