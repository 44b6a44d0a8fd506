"""docs/plugins.md is true: its packages are installed on disk and found by the genuine entry-point machinery."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.cases import make_case
from trl_moe_ext import __version__, hookspecs
from trl_moe_ext.kernels.experts_mlp import experts_mlp
from trl_moe_ext.plugins import PluginHost
from trl_moe_ext.router.losses import LossInput

DOCUMENT = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.DOTALL)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A directory with the documented packages as an installer leaves them: a module and a dist-info each."""
    for declaration, program in zip(blocks("toml"), blocks("python"), strict=True):
        install(tmp_path, tomllib.loads(declaration)["project"], program)
    return tmp_path


def install(site: Path, project: dict[str, Any], program: str) -> None:
    points = project["entry-points"]["trl_moe_ext"].items()
    [module] = [module for _, module in points]
    (site / f"{module}.py").write_text(program)
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    (info / "entry_points.txt").write_text("[trl_moe_ext]\n" + "".join(f"{k} = {v}\n" for k, v in points))


def run(site: Path, program: str, *args: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONWARNINGS": "error::UserWarning:trl_moe_ext"}
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_examples_are_listed_as_documented(site: Path) -> None:
    listed = run(site, "from trl_moe_ext.cli.main import main; main()", "plugins")
    [console] = blocks("console")
    shown = console.partition("\n")[2]
    assert [line.split() for line in listed.replace(__version__, "0.1.0").splitlines() if "─" not in line] == [
        line.split() for line in shown.splitlines() if "─" not in line
    ]


def test_the_installed_kernel_does_what_it_says(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    finite = PluginHost().lookup("register_kernels", "finite").experts_mlp
    case = make_case()
    assert torch.equal(case.run(finite)[0], case.run(experts_mlp)[0])
    case.hidden_states[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="not finite"):
        case.run(finite)


def test_the_installed_router_loss_does_what_it_says(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    function = PluginHost().lookup("register_router_losses", "routing_entropy").function
    undecided, certain, padding = [0.25] * 4, [1.0, 0.0, 0.0, 0.0], [math.nan] * 4
    probabilities = torch.tensor([undecided, certain, padding], requires_grad=True)
    kept = torch.tensor([True, True, False])
    routed = LossInput(probabilities, probabilities, kept, torch.ones(4), num_tokens=8, top_k=2)
    share = function(routed)
    # This micro-batch has two of the step's eight tokens.
    torch.testing.assert_close(share.detach(), torch.tensor(math.log(4) / 8))
    share.backward()
    assert probabilities.grad is not None
    assert probabilities.grad.isfinite().all()
    assert (probabilities.grad[0] != 0).all()
    assert (probabilities.grad[2] == 0).all()


def test_a_broken_installed_plug_in_is_reported_with_its_distribution(site: Path) -> None:
    (site / "finite_experts.py").write_text("import a_module_that_is_missing\n")
    program = (
        "import warnings\n"
        "from trl_moe_ext.plugins import host\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    print(sorted(host().records('register_kernels')))\n"
        "print(*[warning.message for warning in caught], sep='\\n')"
    )
    assert run(site, program).splitlines() == [
        "['fused', 'grouped', 'reference']",
        "plug-in finite (finite-experts 1.0) was left out: "
        "ModuleNotFoundError: No module named 'a_module_that_is_missing'",
    ]


@pytest.mark.parametrize("hook", list(hookspecs.RECORD_TYPES))
def test_the_documented_signature_of_a_hook_is_its_signature(hook: str) -> None:
    signature = str(inspect.signature(getattr(hookspecs, hook))).replace("'", "")
    assert f"| `{hook}` | `{signature}` |" in DOCUMENT
