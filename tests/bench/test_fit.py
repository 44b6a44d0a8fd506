"""What will not fit in memory is refused before it is tried, with figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trl_moe_ext.bench import fit
from trl_moe_ext.bench.available import available_bytes
from trl_moe_ext.bench.fit import needed_bytes, sizes_of, unfit
from trl_moe_ext.bench.peers import PEERS
from trl_moe_ext.bench.plan import Request
from trl_moe_ext.errors import ConfigError

GB = 10**9
CPU = torch.device("cpu")


def request(**changes: Any) -> Request:
    asked = Request("layer", "qwen3-30b-a3b", tuple(PEERS), (512,), "bfloat16", 16, 3, 3, "cpu")
    return replace(asked, **changes)


def left_out(monkeypatch: pytest.MonkeyPatch, available: int | None, **changes: Any) -> dict[tuple[int, str], str]:
    monkeypatch.setattr(fit, "available_bytes", lambda device: available)
    asked = request(**changes)
    return unfit(asked, sizes_of(asked))


@pytest.mark.parametrize("available", [None, 100 * GB])
def test_nothing_is_left_out_where_there_is_room_or_nobody_knows(
    monkeypatch: pytest.MonkeyPatch, available: int | None
) -> None:
    assert left_out(monkeypatch, available) == {}


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as error:
        left_out(monkeypatch, 22 * GB, source="llama4-maverick")
    assert str(error.value) == (
        "llama4-maverick in bfloat16 needs about 33 GB for its weights alone, 22 GB are available on cpu; "
        "use a smaller --shape"
    )
    with pytest.raises(ConfigError, match=r"needs about 65 GB .* use a smaller --shape or --dtype bfloat16"):
        left_out(monkeypatch, 22 * GB, source="llama4-maverick", dtype="float32")


def test_peers_that_do_not_fit_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    found = left_out(monkeypatch, 3 * GB, tokens=(128, 512))
    assert {peer for _, peer in found} == {"moe_esft_quarter", "peft_grouped_mm", "peft_eager"}
    assert found[512, "peft_grouped_mm"] == "It needs about 4.1 GB, 3.0 GB are available"


def test_no_peer_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"even the lightest of .* needs about \d+ GB at 65536 tokens, 3.0 GB are"):
        left_out(monkeypatch, 3 * GB, tokens=(65536,))


def test_the_dense_product_of_stock_llama4_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = left_out(monkeypatch, 8 * GB, source="llama4-scout", tokens=(2048,))
    assert "frozen" in {peer for _, peer in found}
    assert "moe_lora" not in {peer for _, peer in found}


def test_what_makes_a_step_larger() -> None:
    asked = request()
    sizes = sizes_of(asked)
    frozen, ours, theirs, eager = (
        needed_bytes(asked, sizes, PEERS[name], 512)
        for name in ("frozen", "moe_lora", "peft_grouped_mm", "peft_eager")
    )
    stacks = sizes.expert_parameters * 2
    assert sizes.weight_bytes < frozen < ours
    # Merged stacks and their gradient; one expert at a time makes another.
    assert theirs - ours == 2 * stacks
    assert eager - theirs == stacks
    # 13,107,200 expert factors of rank 16, their gradients and two states of AdamW, in float32.
    assert ours - frozen == 4 * 4 * 13_107_200
    # Checkpointing keeps the rows and merged stacks of one layer of the two.
    two = replace(sizes, layers=2)
    kept = needed_bytes(asked, two, PEERS["peft_grouped_mm"], 512)
    assert kept > needed_bytes(replace(asked, gradient_checkpointing=True), two, PEERS["peft_grouped_mm"], 512)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  900 kB\nMemAvailable:   500 kB\n"}


def test_memory_of_the_machine(tmp_path: Path) -> None:
    assert available_bytes(CPU, write(tmp_path, MEMINFO)) == 500 * 1024


def test_memory_of_nowhere(tmp_path: Path) -> None:
    assert available_bytes(CPU, tmp_path) is None


def test_the_limit_of_a_container_counts_if_it_is_lower(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/outer/inner"
    files = {
        **MEMINFO,
        "proc/self/cgroup": "0::/outer/inner\n",
        f"{group}/memory.max": "max\n",
        f"{group}/memory.current": "1\n",
        "sys/fs/cgroup/outer/memory.max": "300000\n",
        "sys/fs/cgroup/outer/memory.current": "200000\n",
        "sys/fs/cgroup/outer/memory.stat": "active_file 7\ninactive_file 40000\n",
    }
    assert available_bytes(CPU, write(tmp_path, files)) == 140_000
    assert available_bytes(CPU, write(tmp_path, {"sys/fs/cgroup/outer/memory.max": "90000000\n"})) == 500 * 1024


def test_the_limit_of_a_container_of_version_1(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/memory/box"
    files = {
        **MEMINFO,
        "proc/self/cgroup": "4:cpu,cpuacct:/box\n3:memory:/box\n",
        f"{group}/memory.limit_in_bytes": "100000\n",
        f"{group}/memory.usage_in_bytes": "30000\n",
        f"{group}/memory.stat": "total_inactive_file 10000\n",
    }
    assert available_bytes(CPU, write(tmp_path, files)) == 80_000


def test_this_machine_tells() -> None:
    found = available_bytes(CPU)
    assert found is None or found > 0
