"""Call one adapted layer of experts in bfloat16, and the reference with the same arguments in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.experts.layout import Projection, expert_weights, weight_view
from trl_moe_ext.kernels.low_rank import LowRank
from trl_moe_ext.kernels.reference import experts_mlp_reference
from trl_moe_ext.tuners.adapted_experts import AdaptedExperts
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts

_TOKENS = 24


# From a layer in float64, the routing, and the tensors that the layer is called with to its output.
Reference = Callable[..., Tensor]


def compare(layer: MoeLoraExperts) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients by name, of `layer` with the adapter ``default`` and of the reference.

    Args:
        layer: in bfloat16.
    """
    return compare_with(layer, _tokens_reference, _rows_reference)


def compare_with(
    layer: AdaptedExperts, tokens_reference: Reference, rows_reference: Reference
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same for a layer of any tuner, with the reference for its way of being called.

    Args:
        layer: in bfloat16.
        tokens_reference: of a layer that is called with tokens, chosen experts and weights.
        rows_reference: of one that is called with rows sorted by expert.
    """
    double = copy.deepcopy(layer).double()
    routing: Tensor | list[int]
    routing, arguments = _rows(layer) if layer.layout.takes_rows else _tokens(layer)
    run = rows_reference if layer.layout.takes_rows else tokens_reference
    leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
    double_leaves = {name: x.double().requires_grad_() for name, x in arguments.items()}
    hidden, *weights = leaves.values()
    found = _with_gradients(layer(hidden, routing, *weights), leaves, layer)
    return found, _with_gradients(run(double, routing, *double_leaves.values()), double_leaves, double)


def _tokens(layer: AdaptedExperts) -> tuple[Tensor, dict[str, Tensor]]:
    """Two chosen experts a token, identity experts among them; tokens and routing weights."""
    generator = torch.Generator().manual_seed(1)
    choices = layer.layout.num_experts + layer.layout.identity_experts
    index = torch.rand(_TOKENS, choices, generator=generator).topk(2).indices
    hidden = torch.randn(_TOKENS, layer.layout.projections[0].in_features, generator=generator)
    weights = torch.rand(_TOKENS, 2, generator=generator)
    return index, {"hidden_states": hidden.bfloat16(), "top_k_weights": weights.bfloat16()}


def _rows(layer: AdaptedExperts) -> tuple[list[int], dict[str, Tensor]]:
    """Rows that are sorted by expert, of which the first has none."""
    experts = layer.layout.num_experts
    sizes = [0, *(1 + expert % 3 for expert in range(experts - 1))]
    rows = torch.randn(sum(sizes), layer.layout.up.in_features, generator=torch.Generator().manual_seed(1))
    return sizes, {"rows": rows.bfloat16()}


def _tokens_reference(layer: MoeLoraExperts, index: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    updates = {f"{p.role}_updates": (_low_rank(layer, p),) for p in layer.layout.projections}
    stacks = expert_weights(layer.get_base_layer(), layer.layout)
    return experts_mlp_reference(hidden, index, weights, stacks, **updates)


def _rows_reference(layer: MoeLoraExperts, sizes: list[int], rows: Tensor) -> Tensor:
    (projection,) = layer.layout.projections
    weight, update = weight_view(layer.get_base_layer(), projection, layer.layout), _low_rank(layer, projection)
    merged = weight.mT + update.scaling * (update.B @ update.A)
    return torch.cat([F.linear(x, merged[expert]) for expert, x in enumerate(torch.split(rows, sizes))])


def _low_rank(layer: MoeLoraExperts, projection: Projection) -> LowRank:
    A, B = (getattr(side["default"], projection.name) for side in (layer.lora_A, layer.lora_B))
    return LowRank(A, B, layer.scaling["default"])


def _with_gradients(out: Tensor, leaves: dict[str, Tensor], layer: AdaptedExperts) -> dict[str, Tensor]:
    of = leaves | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(of.values()), direction)
    return {"output": out} | {f"gradient of {name}": g for name, g in zip(of, gradients, strict=True)}
