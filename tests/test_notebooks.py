"""Every notebook runs from its first cell to its last, and shows what its text promises."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def outputs(notebook: nbformat.NotebookNode) -> str:
    """Everything that the cells printed or returned."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts.append(output.get("text", "") or str(output.get("data", {}).get("text/plain", "")))
    return "\n".join(texts)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_first_fine_tune(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOKS / "01_first_fine_tune.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    printed = outputs(notebook)
    before, after = map(float, re.search(r"evaluation loss ([\d.]+) -> ([\d.]+)", printed).groups())
    assert after < before / 4
    assert re.search(r"routed experts .* 4 .*\d", printed)
    adapter, merged = (re.search(pattern, printed).group(1) for pattern in (r"adapter: (.*)", r"CausalLM \| (.*)"))
    assert adapter == merged
    assert adapter.startswith("Keeper's log.")
    assert not re.search(r"base: +(.*)", printed).group(1).startswith("Keeper's log.")
