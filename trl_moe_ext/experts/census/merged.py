"""The yardstick: a family's own code, with the merged weights in place of the frozen ones, by ordinary autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from trl_moe_ext.experts.layout import stack_of
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts
from trl_moe_ext.tuners.moe_lora.factors import each_expert


def merged_output(adapted: PeftModel, stock: nn.Module, output: Callable[[nn.Module], Tensor]) -> Tensor:
    """The output of `stock` with ``W + s B A`` in place of every adapted W; its graph ends at the factors.

    Args:
        adapted: the model with the adapter ``default``.
        stock: the same model without an adapter.
        output: from a model to one tensor.
    """
    weights: dict[str, Tensor] = {}
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.r:
            # A bare parameter beside an adapted one is wrapped twice.
            weights |= {f"{name}.{path}".replace("base_layer.", ""): w for path, w in _merged(layer).items()}
    with (
        torch.nn.utils.stateless._reparametrize_module(stock, weights, tie_weights=True),
        warnings.catch_warnings(),
    ):
        # From families that cast their router in each forward: torch looks at the `.grad` of what is cast.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        return output(stock)


def _merged(layer: BaseTunerLayer) -> dict[str, Tensor]:
    base = layer.get_base_layer()
    if isinstance(layer, MoeLoraExperts):
        return dict(_merged_stacks(layer, base))
    path = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    return {path: getattr(base, path) + layer.get_delta_weight("default")}


def _merged_stacks(layer: MoeLoraExperts, base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for projection in layer.layout.projections:
        stack = stack_of(base, projection)
        # Each expert's product by itself, from the parameters: nothing of what hands them to the kernels.
        factors = layer.rank_classes["default"], layer.lora_A["default"], layer.lora_B["default"]
        products = {
            expert: layer.lora_alpha["default"] / each.rank * (B @ A)
            for expert, each, A, B in each_expert(*factors, projection, layer.layout.num_experts)
        }
        if not products:
            continue
        none = stack.new_zeros(projection.out_features, projection.in_features)
        delta = torch.stack([products.get(expert, none) for expert in range(layer.layout.num_experts)])
        delta = (delta.mT if projection.is_transposed else delta).reshape(-1, *stack.shape[1:])
        # Behind the experts there may be rows that none of them uses.
        unused = delta.new_zeros(len(stack) - len(delta), *stack.shape[1:])
        yield projection.parameter, stack + torch.cat([delta, unused])
