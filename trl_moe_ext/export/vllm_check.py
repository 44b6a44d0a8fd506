"""Does a folder in vLLM's layout change a model as its adapter does?

The folder is read by `vllm_decoder`, which shares no code with the writer, and each weight's change is compared with
the product of the layer's own factors, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from trl_moe_ext.errors import AdapterFileError
from trl_moe_ext.experts.layout import ExpertsLayout
from trl_moe_ext.export.hub_names import parts_of
from trl_moe_ext.export.vllm_decoder import iter_deltas
from trl_moe_ext.export.vllm_layers import AdaptedLayers, read_layers
from trl_moe_ext.kernels.low_rank import LowRank

__all__ = ["verify_export"]

# ``(r, in)``, ``(out, r)`` and the scaling; None for a weight that is not to change.
_Factors = tuple[Tensor, Tensor, float] | None


def verify_export(
    folder: str | Path, model: PeftModel, adapter_name: str = "default", tolerance: float = 1e-4
) -> None:
    """Compare what a folder adds to each weight with what the layers of `model` add.

    It costs two products of factors for each adapted matrix, and the memory of a few of them.

    Args:
        model: with the factors; its base weights may be on the meta device.
        tolerance: largest difference, as a share of the largest number of the weight's change.

    Raises:
        AdapterFileError: there is a larger difference, or an adapted weight is missing or unknown.
    """
    expected = dict(_factors(model, adapter_name, read_layers(model, adapter_name)))
    for name, found in iter_deltas(folder):
        if name not in expected:
            raise AdapterFileError(f"{folder} adapts {name}, which the model does not; export the adapter again")
        difference = _difference(found, expected.pop(name))
        if not difference <= tolerance:  # nor NaN
            raise AdapterFileError(
                f"{folder} does not change {name} as the model's adapter does: the largest difference is "
                f"{difference:.2g} of the largest change, and {tolerance:g} is allowed. Export the adapter again"
            )
    if expected:
        raise AdapterFileError(f"{folder} has nothing for {min(expected)}, which the model adapts; export it again")


@torch.no_grad()
def _difference(found: Tensor, factors: _Factors) -> float:
    if factors is None:
        return float("inf") if found.any() else 0.0
    A, B, scaling = factors
    # Not on the layer's device, where products may be rounded to less than float32.
    wanted = scaling * (B.detach().cpu().float() @ A.detach().cpu().float())
    if wanted.shape != found.shape:
        return float("inf")
    scale = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
    return ((found - wanted).abs().max() / scale).item()


def _factors(model: PeftModel, adapter_name: str, layers: AdaptedLayers) -> Iterator[tuple[str, _Factors]]:
    """Name in the checkpoint -> factors."""
    base = model.get_base_model()
    for path in layers.linears:
        layer = base.get_submodule(path)
        A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        yield layers.names.linears[path], (A, B, layer.scaling[adapter_name])
    for path, stack in layers.experts.items():
        layer = base.get_submodule(path)
        for projection in stack.layout.projections:
            updates = dict(_of_experts(layer.updates(adapter_name, projection)))
            parts = parts_of(projection, stack.layout)
            for expert in range(stack.layout.num_experts):
                for position, part in enumerate(parts):
                    name = layers.names.experts[path, expert, part]
                    if expert not in updates:
                        yield name, None
                    else:
                        A, B, scaling = updates[expert]
                        yield name, (A, B[_rows(projection.out_features, position, len(parts), stack.layout)], scaling)


def _of_experts(updates: Iterable[LowRank]) -> Iterator[tuple[int, tuple[Tensor, Tensor, float]]]:
    """Adapted expert -> its factors and scaling."""
    for update in updates:
        for expert, A, B in zip(update.experts, update.A, update.B, strict=True):
            yield expert, (A, B, update.scaling)


def _rows(out_features: int, position: int, count: int, layout: ExpertsLayout) -> slice:
    """Those of a stack that are of one of the `count` projections that it holds."""
    if layout.is_interleaved:
        return slice(position, None, count)
    size = out_features // count
    return slice(position * size, (position + 1) * size)
