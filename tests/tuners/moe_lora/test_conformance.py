"""What MOE_LORA promises on every family whose experts go through transformers' experts interface.

The yardstick is the family's own code: its module of experts in float64, in its eager implementation, with the merged
weight ``W + s B A`` put in place of W. It shares nothing with the grouped kernels.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.families import (
    build,
    build_experts,
    experts_classes,
    experts_of,
    inputs,
    interface_families,
    randomise_factors,
)
from tests.tolerances import assert_gradient_close, assert_output_close, relative_error
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.experts.layout import read_layout
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts

FAMILIES = interface_families()
DTYPES = [torch.float32, torch.bfloat16]


def adapted(model_type: str, **options) -> tuple[nn.Module, dict[str, Tensor]]:
    return get_peft_model(build(model_type), MoeLoraConfig(r=3, lora_alpha=5, **options)).eval(), inputs(model_type)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**batch)[0]
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_new_adapter_changes_nothing(model_type):
    expected = logits(build(model_type), inputs(model_type))
    model, batch = adapted(model_type)
    assert any(isinstance(module, MoeLoraExperts) for module in model.modules())
    assert_output_close(logits(model, batch), expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", [*FAMILIES, *experts_classes()])
def test_experts_equal_the_familys_own_code_with_merged_weights(model_type, dtype):
    experts = experts_of(build(model_type, dtype)) if model_type in FAMILIES else build_experts(model_type, dtype)
    experts.requires_grad_(False)
    layer = MoeLoraExperts(experts, "default", MoeLoraConfig(r=3), r=3, lora_alpha=5)
    randomise_factors(nn.ModuleDict({"layer": layer}))
    layer.to(dtype)
    leaves = {
        "hidden_states": torch.randn(17, layer.layout.up.in_features).to(dtype),
        "top_k_weights": torch.rand(17, 2).to(dtype),
        **{name: p.detach() for name, p in layer.named_parameters() if ".default." in name},
    }
    index = torch.rand(17, layer.layout.num_experts).topk(2, -1).indices
    grad = torch.randn(17, layer.layout.down.out_features).to(dtype)

    x, w = (leaves[name].clone().requires_grad_() for name in ("hidden_states", "top_k_weights"))
    out = layer(x, index, w)
    out.backward(grad)
    expected, gradients = merged_reference(experts, layer, leaves, index, grad)

    assert_output_close(out, expected, dtype)
    actual = {"hidden_states": x.grad, "top_k_weights": w.grad}
    actual |= {name: p.grad for name, p in layer.named_parameters() if ".default." in name}
    for name, gradient in gradients.items():
        assert_gradient_close(actual[name], gradient, dtype, name)
    assert all(p.grad is None for p in experts.parameters()), "frozen weights must have no gradient"


def merged_reference(experts, layer, leaves, index, grad) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the stock module in float64 with merged weights, by ordinary autograd."""
    stock = copy.deepcopy(experts).double()
    stock.config._experts_implementation = "eager"
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    layout = read_layout(stock)
    weights = {}
    for projection in layout.projections:
        A, B = leaves[f"lora_A.default.{projection.name}"], leaves[f"lora_B.default.{projection.name}"]
        delta = layer.scaling["default"] * (B @ A)
        weights[projection.name] = getattr(stock, projection.name) + (delta.mT if layout.is_transposed else delta)
    out = torch.func.functional_call(stock, weights, (leaves["hidden_states"], index, leaves["top_k_weights"]))
    gradients = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
    return out, dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_merging_gives_the_same_model(model_type):
    model, batch = adapted(model_type)
    randomise_factors(model)
    expected = logits(model, batch)
    assert relative_error(logits(build(model_type), batch), expected) > 1e-3, "the adapter must matter"
    merged = model.merge_and_unload()
    assert not any(isinstance(module, MoeLoraExperts) for module in merged.modules())
    assert_output_close(logits(merged, batch), expected, torch.float32)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_equals_stock_peft_with_the_same_factors(model_type):
    """PEFT's `target_parameters` builds every merged weight; the mathematics is the same."""
    model, batch = adapted(model_type, moe_target=["experts"])
    randomise_factors(model)
    names = {p.name for m in model.modules() if isinstance(m, MoeLoraExperts) for p in m.layout.projections}
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=[], target_parameters=[f"experts.{name}" for name in sorted(names)]
    )
    stock = get_peft_model(build(model_type), config).eval()
    copy_factors(model, stock)
    assert_output_close(logits(model, batch), logits(stock, batch), torch.float32)


def copy_factors(model: nn.Module, stock: nn.Module) -> None:
    """Into PEFT's flat layout: A with the expert slowest, B with the expert fastest."""
    ours = {name: m for name, m in model.named_modules() if isinstance(m, MoeLoraExperts)}
    wrappers = [m for m in stock.modules() if type(m).__name__ == "ParamWrapper"]
    by_base = {id(layer): layer for layer in ours.values()}
    assert len(wrappers) == 2 * len(by_base)
    names = {id(m): name for name, m in stock.named_modules()}
    for wrapper in wrappers:
        name = names[id(wrapper)].removesuffix(".base_layer")
        layer = ours[name]
        A = getattr(layer.lora_A["default"], wrapper.parameter_name).data
        B = getattr(layer.lora_B["default"], wrapper.parameter_name).data
        assert A.shape[0] != A.shape[1], "E must differ from r, or a swapped order would pass"
        wrapper.lora_A["default"].weight.data = A.reshape(-1, A.shape[2]).clone()
        wrapper.lora_B["default"].weight.data = B.permute(1, 2, 0).reshape(B.shape[1], -1).clone()


@pytest.mark.parametrize("mutation", ["without the low-rank term", "with two experts swapped", "with B transposed"])
def test_the_conformance_tests_can_fail(mutation):
    model, batch = adapted("qwen3_moe")
    randomise_factors(model)
    expected = logits(model, batch)
    layer = next(module for module in model.modules() if isinstance(module, MoeLoraExperts))
    B = layer.lora_B["default"].gate_up_proj
    if mutation == "without the low-rank term":
        B.data.zero_()
    elif mutation == "with two experts swapped":
        B.data = B.data[torch.tensor([1, 0, *range(2, 8)])]
    else:
        B.data = B.data.reshape(B.shape[0], B.shape[2], B.shape[1]).mT.contiguous()
    assert relative_error(logits(model, batch), expected) > 1e-3
