"""Where a run took place: versions and device."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

from trl_moe_ext._version import __version__
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.machine import processor, usable_cores


def choose_device(wanted: str | None) -> str:
    """The device to run on: what is wanted, else a GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device, or its memory cannot be measured.
    """
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"{wanted!r} is not a device of torch; use cpu, cuda, or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"memory is measured on cpu and cuda only, not on {wanted}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no {wanted} here: torch sees {torch.cuda.device_count()} CUDA devices")
    return wanted


def machine(device: str) -> dict[str, Any]:
    """Versions of what was measured, the device's name, and what it has of cores and threads."""
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "versions": {**libraries, "trl_moe_ext": __version__, "python": platform.python_version()},
        "device": {
            "type": device,
            "name": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
            "cores": usable_cores(),
            "torch_threads": torch.get_num_threads(),
        },
    }


def in_words(facts: dict[str, Any]) -> str:
    """`machine` in a line."""
    device, versions = facts["device"], facts["versions"]
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{device['name']}, {device['cores']} cores, {device['torch_threads']} threads of torch; {names}"
