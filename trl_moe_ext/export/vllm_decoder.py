"""Reads an adapter folder as vLLM understands it, and tells what it changes in each weight.

Nothing here is shared with `vllm_tensors` and `vllm_writer`, which write such folders: the two are each other's test.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trl_moe_ext.errors import AdapterFileError

__all__ = ["expert_deltas", "iter_deltas", "read_deltas"]

_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<index>\d+)\.(?P<projection>\w+)")
# The three projections of a gated MLP in the two ways that checkpoints name them.
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def read_deltas(folder: str | Path) -> dict[str, Tensor]:
    """What `iter_deltas` tells, at once: as large as all adapted weights together."""
    return dict(iter_deltas(folder))


def iter_deltas(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Name of each adapted module, and what is added to its weight: ``(out, in)`` in float32.

    Raises:
        AdapterFileError: a tensor is no factor of a pair, or the pair does not fit together.
    """
    config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    keys: defaultdict[str, dict[str, str]] = defaultdict(dict)
    with safe_open(Path(folder, "adapter_model.safetensors"), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a dictionary
            match = _FACTOR.fullmatch(key)
            if match is None:
                raise AdapterFileError(f"{folder}: {key} is neither lora_A nor lora_B of a module")
            keys[match["module"]][match["side"]] = key
        for module, sides in keys.items():
            yield module, _delta(module, {side: file.get_tensor(key).float() for side, key in sides.items()}, config)


def _delta(module: str, pair: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    A, B = pair.get("A"), pair.get("B")
    if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        shapes = {side: tuple(tensor.shape) for side, tensor in sorted(pair.items())}
        raise AdapterFileError(f"{module} should have lora_A (r, in) and lora_B (out, r); found {shapes}")
    if A.shape[0] > config["r"]:
        raise AdapterFileError(f"{module} has rank {A.shape[0]}, more than r={config['r']} of the config")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise AdapterFileError("rank_pattern and alpha_pattern are not read; not every vLLM does")
    divisor = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    return torch.mm(B, A) * float(config["lora_alpha"] / divisor)


def expert_deltas(folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """The same for routed experts: module of experts -> ``gate``, ``up`` and ``down`` -> ``(E, out, in)``.

    Raises:
        AdapterFileError: also if an expert lacks a projection that another one has.
    """
    found: defaultdict[str, defaultdict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for module, delta in read_deltas(folder).items():
        match = _EXPERT.fullmatch(module)
        if match is not None:
            found[match["experts"]][_PARTS[match["projection"]]][int(match["index"])] = delta
    stacked: dict[str, dict[str, Tensor]] = {}
    for experts, parts in found.items():
        indices = set().union(*parts.values())
        if any(set(each) != set(range(len(indices))) for each in parts.values()):
            raise AdapterFileError(f"{experts}: not every expert of 0 to {max(indices)} has all of {sorted(parts)}")
        stacked[experts] = {part: torch.stack([each[e] for e in sorted(each)]) for part, each in parts.items()}
    return stacked
