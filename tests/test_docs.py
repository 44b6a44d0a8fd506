"""README and docs are true: their Python runs, their links lead somewhere, their lists are complete."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from peft import LoraConfig

from trl_moe_ext.hosts.trl_arguments import CONFIG_FIELDS
from trl_moe_ext.tuners.moe_esft import MoeEsftConfig
from trl_moe_ext.tuners.moe_lora import config as options
from trl_moe_ext.tuners.targets.options import PROJECTION_WORDS, TARGET_WORDS

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.md")])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert (tmp_path / "out" / "readme" / "adapter_model.safetensors").exists()
    assert "peft" not in type(namespace["merged"]).__module__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_options_page_names_every_option_and_every_refusal():
    page = (ROOT / "docs" / "options.md").read_text()
    own = {f.name for config in (options.MoeLoraConfig, MoeEsftConfig) for f in fields(config)}
    own -= {f.name for f in fields(LoraConfig)} | {"saved_with"}
    for name in [*own, *options._REFUSED, *TARGET_WORDS, *PROJECTION_WORDS, *options.EXPERT_RANKS]:
        assert f"`{name}`" in page or f"--{name}`" in page, name
    for flag in CONFIG_FIELDS:
        assert f"`--{flag}`" in page, flag


def test_the_architecture_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = {path.name for path in (ROOT / "trl_moe_ext").iterdir() if path.is_dir() and path.name != "__pycache__"}
    for room in rooms:
        assert f"`{room}/" in page, room
