"""The factors of an adapter in vLLM's layout: a plain LoRA with a pair for each projection of each expert ("2D").

    model.layers.0.mlp.experts.7.gate_proj.lora_A.weight   (r, in)
    model.layers.0.mlp.experts.7.gate_proj.lora_B.weight   (out, r)

under PEFT's ``base_model.model.``. vLLM knows one scaling, ``lora_alpha / r`` of the config, and takes factors of any
rank up to its ``--max-lora-rank``. So the config has the largest rank and the scaling of the experts, and layers with
another scaling have the difference in their B. Patterns of ranks and scalings, which newer versions read and older
ones pass over in silence, are not used.

It stacks the factors of all experts of a module: experts that are not adapted have zeros, and where ranks differ
zeros fill them up to the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor

from trl_moe_ext.experts.layout import Projection
from trl_moe_ext.export.vllm_layers import AdaptedLayers, AdaptedStack, split_rows

__all__ = ["PREFIX", "vllm_tensors"]

# Of every name in a saved adapter.
PREFIX = "base_model.model."


def vllm_tensors(layers: AdaptedLayers, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every factor under its name in the file, without the prefix and ``.weight``.

    Args:
        layers: that are adapted.
        state: of one adapter, named as `peft.get_peft_model_state_dict` does.
    """
    for path, scaling in layers.linears.items():
        name = layers.names.linears[path]
        yield f"{name}.lora_A", state[f"{PREFIX}{path}.lora_A.weight"].clone()
        B = _scaled(state[f"{PREFIX}{path}.lora_B.weight"], scaling / layers.scaling)
        yield f"{name}.lora_B", B.clone(memory_format=torch.contiguous_format)
    for path, stack in layers.experts.items():
        for projection in stack.layout.projections:
            A, B = _of_all_experts(state, path, stack, projection, layers.scaling)
            for part, rows in split_rows(B, projection, stack.layout):
                for expert in range(stack.layout.num_experts):
                    name = layers.names.experts[path, expert, part]
                    yield f"{name}.lora_A", A[expert].clone()
                    yield f"{name}.lora_B", rows[expert].clone(memory_format=torch.contiguous_format)


def _of_all_experts(
    state: Mapping[str, Tensor], path: str, stack: AdaptedStack, projection: Projection, common_scaling: float
) -> tuple[Tensor, Tensor]:
    """``(E, r, in)`` and ``(E, out, r)``, with zeros where nothing is adapted, and up to the largest rank."""
    E, rows, columns = stack.layout.num_experts, projection.out_features, projection.in_features
    found = []
    for rank_class, scaling in stack.classes:
        A, B = (state.get(f"{PREFIX}{path}.lora_{side}.{rank_class.factors_of(projection)}") for side in "AB")
        if A is not None and B is not None:
            found.append(([*rank_class.experts(E)], A, _scaled(B, scaling / common_scaling)))
    if not found:
        return torch.zeros(E, 1, columns), torch.zeros(E, rows, 1)
    all_a = torch.zeros(E, stack.rank, columns, dtype=found[0][1].dtype)
    all_b = torch.zeros(E, rows, stack.rank, dtype=reduce(torch.promote_types, (B.dtype for *_, B in found)))
    for experts, A, B in found:
        all_a[experts, : A.shape[1]] = A.cpu()
        all_b[experts, :, : B.shape[2]] = B.to("cpu", all_b.dtype)
    return all_a, all_b


def _scaled(B: Tensor, factor: float) -> Tensor:
    """In float32 if numbers change, so that nothing is rounded twice."""
    return B if factor == 1 else B.float() * factor
