"""Imports point down only: the table of docs/architecture.md, enforced on every import statement."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trl_moe_ext"

LAYERS = {
    "errors": 0,
    "files": 0,
    "hookspecs": 0,
    "machine": 0,
    "plugin_loading": 0,
    "plugins": 0,
    "_autoload": 0,
    "_version": 0,
    "kernels": 1,
    "experts": 2,
    "experts.census": 4,
    "router": 2,
    "profiles": 2,
    "tuners": 3,
    "reporting": 4,
    "bench": 4,
    "bench.grpo": 6,
    "export": 4,
    "sft": 5,
    "grpo": 5,
    "hosts": 6,
    "cli": 6,
}
# Layer from which on a library may be imported. The plug-in host checks records against types named as strings.
LIBRARIES = {
    "pluggy": 0,
    "torch": 1,
    "transformers": 2,
    "matplotlib": 2,
    "peft": 3,
    "rich": 4,
    "trl": 4,
    "datasets": 4,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def room(path: Path) -> str:
    """The innermost room of the table that a file stands in."""
    return room_of_module(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def room_of_module(name: str) -> str:
    """The same for a module, by its name inside the package."""
    top, _, rest = name.partition(".")
    inner = f"{top}.{rest.partition('.')[0]}"
    return inner if inner in LAYERS else top


def imported(path: Path) -> set[str]:
    """Every module that a file imports when it runs, at any depth; imports for type checkers are left out."""
    names: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from trl_moe_ext import x` names the room in the alias.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        pending.extend(ast.iter_child_nodes(node))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_its_own_layer_and_those_below(path):
    here = LAYERS[room(path)]
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "trl_moe_ext":
            other = room_of_module(rest)
            assert LAYERS.get(other, 0) <= here, f"{path.name} (layer {here}) imports {name} (layer {LAYERS[other]})"
            # Rooms of one layer stay apart, but for the two that serve everyone.
            if other in LAYERS and LAYERS[other] == here and here in (3, 4, 5):
                assert other == room(path), f"{path.name} imports sideways: {name}"
        elif top in LIBRARIES:
            assert LIBRARIES[top] <= here, f"{path.name} (layer {here}) imports {name}"


def test_tuners_do_not_import_each_other_and_what_they_share_imports_none():
    tuners = {p.name for p in (PACKAGE / "tuners").glob("moe_*") if p.is_dir()}
    assert len(tuners) > 1
    for path in (PACKAGE / "tuners").rglob("*.py"):
        others = tuners - {path.parent.name}
        assert not any(f"tuners.{other}." in f"{name}." for name in imported(path) for other in others), path


def test_the_check_can_fail(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from trl_moe_ext.tuners import moe_lora\n    import peft\n")
    assert {"trl_moe_ext.tuners.moe_lora", "peft"} <= imported(wrong)
