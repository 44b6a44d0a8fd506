"""How much each expert of a model was used on a data set, as it is kept in a file.

Legend: E experts of a layer, K top_k.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.files import write_atomically

__all__ = ["SCORES", "ExpertProfile", "LayerUse"]

SCORES = ("token_share", "gate_score")
VERSION = 1


@dataclass(frozen=True)
class LayerUse:
    """How much each expert behind one router was used.

    Attributes:
        label: short and unique in the model, such as ``3``.
        router: name of the router's module in the model without adapters.
        experts: names of all modules of experts that the router sends tokens to.
        top_k: K.
        tokens: how many tokens it saw, without padding.
        token_share: ``(E,)``, the part of the choices, K a token, that fell on each expert; sums to one.
        gate_score: ``(E,)``, mean over all tokens of the weight of each expert, zero where it was not chosen.
        fingerprint: some numbers of the router's weights, which tell whether a model is the one that was profiled.

    Both measures are those of ESFT (arXiv 2407.01906, section 3.2), of experts with weights: what went to identity
    experts, or skipped all, is in neither.
    """

    label: str
    router: str
    experts: tuple[str, ...]
    top_k: int
    tokens: int
    token_share: tuple[float, ...]
    gate_score: tuple[float, ...]
    fingerprint: tuple[float, ...]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.token_share)

    def shares(self, score: str = "token_share") -> tuple[float, ...]:
        """``(E,)``: the measure of that name, scaled to a sum of one; equal shares where no expert was used."""
        values: tuple[float, ...] = getattr(self, score)
        total = sum(values)
        return tuple(value / total for value in values) if total else (1 / self.num_experts,) * self.num_experts


@dataclass(frozen=True)
class ExpertProfile:
    """The use of the experts of all layers.

    Attributes:
        model: name or path of the model.
        architecture: name of its class.
        dataset: what it was run on, for people to read.
        tokens: how many tokens of that, without padding.
        layers: in the order of the model.
        left_out: modules of experts without a router of their own -> the reason.
    """

    model: str
    architecture: str
    dataset: str
    tokens: int
    layers: tuple[LayerUse, ...]
    left_out: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {"version": VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write the profile as JSON; a killed process leaves the old file or the new one."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: Path) -> ExpertProfile:
        """Read what `save` has written.

        Raises:
            ConfigError: there is no such file, or it is no profile of a version that is known.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored.pop("version") != VERSION:
                raise ValueError("of a version of trl_moe_ext that is not this one")
            layers = tuple(_layer(layer) for layer in stored.pop("layers"))
            return cls(layers=layers, **stored)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path} does not exist; make it with: trl-moe profile MODEL --dataset DATASET --out {path}"
            ) from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is not a profile of experts ({error}); make it with `trl-moe profile`"
            ) from error


def _layer(stored: dict[str, Any]) -> LayerUse:
    token_share, gate_score, fingerprint = (_numbers(stored, name) for name in (*SCORES, "fingerprint"))
    layer = LayerUse(
        experts=tuple(map(str, stored.pop("experts"))),
        token_share=token_share,
        gate_score=gate_score,
        fingerprint=fingerprint,
        **stored,
    )
    if len(token_share) != len(gate_score) or not token_share:
        raise ValueError(f"layer {layer.label} has {len(token_share)} and {len(gate_score)} experts")
    if min(token_share) < 0 or not layer.experts:
        raise ValueError(f"layer {layer.label} has a negative share, or no modules of experts")
    return layer


def _numbers(stored: dict[str, Any], name: str) -> tuple[float, ...]:
    numbers = tuple(map(float, stored.pop(name)))
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} of layer {stored.get('label')} is not finite")
    return numbers
