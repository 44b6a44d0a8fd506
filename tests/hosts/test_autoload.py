"""The mechanics of autoload, on small stand-ins for the host libraries: hooks, cost, and what never breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts.processes import run_python

# A stand-in for `trl_moe_ext.hosts.*` that writes down which host was served, and whether it was complete.
RECORDING_HOSTS = """
import sys, types
served = []
def record(name):
    def serve():
        served.append((name, hasattr(sys.modules[name], "END")))
    return serve
sys.modules["trl_moe_ext.hosts.peft"] = types.SimpleNamespace(register=record("peft"))
sys.modules["trl_moe_ext.hosts.trl"] = types.SimpleNamespace(
    install_parser=record("trl.scripts.utils"), install_peft_config=record("trl.trainer.utils")
)
"""
AUTOLOAD = "from trl_moe_ext._autoload import autoload; autoload()\n"


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A folder with packages `peft` and `trl` whose modules end with ``END = True``, to be put on the path."""
    for module in ("peft/__init__", "trl/__init__", "trl/scripts/__init__", "trl/trainer/__init__"):
        (tmp_path / f"{module}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{module}.py").write_text("END = True\n")
    for module in ("trl/scripts/utils", "trl/trainer/utils"):
        (tmp_path / f"{module}.py").write_text("END = True\n")
    return tmp_path


def run_with(libraries: Path, code: str, **env: str) -> str:
    """stderr of `code`, run with the stand-ins first on the path."""
    return run_python(code, libraries, {"PYTHONPATH": str(libraries), **env}).stderr


def test_hosts_are_served_once_they_are_complete(libraries: Path) -> None:
    run_with(
        libraries,
        RECORDING_HOSTS + AUTOLOAD + "import peft, trl\nassert served == [('peft', True)], served\n"
        "import trl.trainer.utils, trl.trainer.utils, peft\n"
        "assert served == [('peft', True), ('trl.trainer.utils', True)], served\n"
        "assert type(peft.__loader__).__name__ == 'SourceFileLoader'\n",
    )


def test_a_complete_host_is_served_at_once(libraries: Path) -> None:
    run_with(
        libraries,
        "import trl.scripts.utils\n" + RECORDING_HOSTS + AUTOLOAD + "assert served == [('trl.scripts.utils', True)]\n",
    )


def test_a_host_under_way_is_served_at_its_end(libraries: Path) -> None:
    """`from trl.trainer.utils import ...` as the first import: torch comes in the middle of that very module."""
    (libraries / "trl/trainer/utils.py").write_text(AUTOLOAD + AUTOLOAD + "import served_list\nEND = True\n")
    (libraries / "served_list.py").write_text("import __main__\nassert __main__.served == []\n")
    run_with(
        libraries,
        RECORDING_HOSTS + "from trl.trainer.utils import END\n"
        "assert served and set(served) == {('trl.trainer.utils', True)}, served\n"
        "import trl.trainer.utils as host\n"
        "assert type(host.__spec__).__name__ == 'ModuleSpec' and not host.__spec__._initializing\n",
    )


def test_a_host_that_fails_to_import_is_served_when_it_succeeds(libraries: Path) -> None:
    (libraries / "peft/__init__.py").write_text(
        "import os\n" + AUTOLOAD + "if 'BROKEN' in os.environ:\n    raise ImportError('broken')\nEND = True\n"
    )
    run_with(
        libraries,
        RECORDING_HOSTS + "import os\nfor _ in range(2):\n    try:\n        import peft\n    except ImportError:\n"
        "        assert served == []\n        del os.environ['BROKEN']\nassert ('peft', True) in served, served\n",
        BROKEN="1",
    )


def test_only_the_module_of_a_shared_loader_is_served(tmp_path: Path) -> None:
    """All modules of a zip file may share one loader, whose `exec_module` is then ours."""
    code = """
import sys, zipfile
with zipfile.ZipFile("libraries.zip", "w") as archive:
    archive.writestr("peft.py", "END = True")
    archive.writestr("other.py", "import peft")
sys.path.insert(0, "libraries.zip")
import importlib.util
spec = importlib.util.find_spec("peft")
import other
assert served == [("peft", True)], served
spec.loader.exec_module(sys.modules["other"])
assert served == [("peft", True)], served
"""
    run_python(RECORDING_HOSTS + AUTOLOAD + code, tmp_path)


@pytest.mark.parametrize(("value", "count"), [("1", 0), ("yes", 0), ("0", 1), ("", 1)])
def test_disable_variable(value: str, count: int, libraries: Path) -> None:
    run_with(
        libraries,
        RECORDING_HOSTS + AUTOLOAD + f"import peft\nassert len(served) == {count}, served\n",
        TRL_MOE_EXT_DISABLE=value,
    )


def test_twice_is_once(libraries: Path) -> None:
    run_with(libraries, RECORDING_HOSTS + AUTOLOAD * 2 + "import peft\nassert served == [('peft', True)], served\n")


def test_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`import torch` pays for few calls and for no module that torch would not have imported itself.

    The time is printed, not compared: it says more of the machine than of the code.
    """
    code = """
import sys
import __future__, collections.abc, functools, importlib, importlib.machinery, os, types, typing, warnings
before, calls = set(sys.modules), 0
def count(frame, event, argument):
    global calls
    calls += event == "call" and "trl_moe_ext" in frame.f_code.co_filename
sys.setprofile(count)
from trl_moe_ext._autoload import autoload
autoload()
sys.setprofile(None)
new = {name for name in set(sys.modules) - before if not name.startswith("__editable__")}
assert new == {"trl_moe_ext", "trl_moe_ext._version", "trl_moe_ext._autoload"}, new
assert 3 <= calls <= 30, calls
"""
    run_python(code, tmp_path)
    timed = """
import os, sys, time, typing, warnings
begin = time.perf_counter()
from trl_moe_ext._autoload import autoload
loaded = time.perf_counter()
autoload()
print(f"import {1e3 * (loaded - begin):.2f} ms, autoload() {1e3 * (time.perf_counter() - loaded):.2f} ms")
"""
    with capsys.disabled():
        print(f"\n{run_python(timed, tmp_path).stdout.strip()}")


BROKEN_HOSTS = """
import sys, types
def fail():
    raise RuntimeError("a bug of ours")
sys.modules["trl_moe_ext.hosts.peft"] = types.SimpleNamespace(register=fail)
sys.modules["trl_moe_ext.hosts.trl"] = types.SimpleNamespace(install_parser=fail, install_peft_config=fail)
"""


@pytest.mark.parametrize("first", ["import torch, peft, trl.scripts.utils", "import peft, trl.scripts.utils, torch"])
def test_a_bug_of_ours_never_breaks_torch(first: str, libraries: Path) -> None:
    """Also not where `import torch` itself runs the hook, and one warning a library is enough."""
    code = f"{BROKEN_HOSTS}{first}\nimport trl.trainer.utils\nassert torch.ones(2).sum() == 2 and peft.END\n"
    for line in ("RuntimeWarning: trl_moe_ext leaves peft", "RuntimeWarning: trl_moe_ext leaves trl"):
        assert run_with(libraries, code).count(line) == 1
    raised = run_with(libraries, code, PYTHONWARNINGS="error::RuntimeWarning")
    assert raised.count("trl_moe_ext leaves peft as it is: RuntimeError: a bug of ours") == 1


@pytest.mark.parametrize(
    ("module", "seam"),
    [
        ("peft", "peft.utils.peft_types:PeftType"),
        ("trl.scripts.utils", "trl.scripts.utils:TrlParser"),
        ("trl.trainer.utils", "trl.trainer.utils:get_peft_config"),
    ],
)
def test_another_version_is_named(module: str, seam: str, libraries: Path) -> None:
    """One warning: the library, its version, what was not found, and the versions that do have it."""
    library = module.partition(".")[0]
    metadata = libraries / f"{library}-9.9.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {library}\nVersion: 9.9.0\n")
    code = f"import sys, {module}\nassert sys.modules['{module}'].END\n"
    stderr = run_with(libraries, AUTOLOAD + code)
    assert stderr.count("RuntimeWarning") == 1
    assert f"{library} 9.9.0" in stderr
    assert seam in stderr
    assert {"peft": "peft>=0.21.2,<0.22", "trl": "trl>=1.16,<1.17"}[library] in stderr
