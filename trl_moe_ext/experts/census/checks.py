"""What MOE_LORA promises on every family: one function a promise, which builds its own models and raises if broken.

Whole models are compared in float64, see `comparing`. Rounding is the subject of `bfloat16`, which compares single
layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.experts.census import promises
from trl_moe_ext.experts.census.calls import compare
from trl_moe_ext.experts.census.comparing import (
    BFLOAT16,
    CheckError,
    direction_of,
    gradients_of,
    output_of,
    relative_error,
    require_close,
    require_close_gradients,
    require_equal,
    stock_model,
)
from trl_moe_ext.experts.census.merged import merged_output
from trl_moe_ext.experts.census.selecting import changed_experts, some_experts
from trl_moe_ext.experts.census.tiny import build
from trl_moe_ext.experts.census.weights import randomise_factors
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts
from trl_moe_ext.tuners.targets.options import TARGET_WORDS

WORDS = list(TARGET_WORDS)


def identity(model_type: str) -> None:
    """A new adapter changes nothing."""
    stock = stock_model(model_type)
    expected = output_of(stock)
    require_close(output_of(_adapted(stock, init_lora_weights=True)), expected, "output of a new adapter")


def reference(model_type: str) -> None:
    """Output and every gradient are those of the family's own code with merged weights."""
    stock = stock_model(model_type).requires_grad_(False)
    model = _adapted(copy.deepcopy(stock))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # In this order: some families change the dtype of a weight when they are first called.
    unadapted, found = output_of(stock), output_of(model)
    expected = merged_output(model, stock, output_of)
    require_close(found, expected, "output")
    if relative_error(unadapted, expected) < 1e-3:
        raise CheckError("the adapter does not change the output: nothing was tested")
    direction = direction_of(expected)
    require_close_gradients(
        factors, gradients_of(found, factors, direction), gradients_of(expected, factors, direction)
    )


def merge(model_type: str) -> None:
    """Merged weights give the same output, unmerging gives the old weights back, and unloading leaves no trace."""
    promises.keeps_merging(stock_model(model_type), _adapted)


def reload(model_type: str) -> None:
    """A saved adapter, loaded by PEFT or by transformers itself, gives the same output to the last bit."""
    promises.keeps_reloading(stock_model(model_type), _adapted)


def two_adapters(model_type: str) -> None:
    """Adapters of different rank on one model: each alone, both together, one deleted."""
    model = _adapted(stock_model(model_type))
    second = promises.keeps_apart(model, MoeLoraConfig(r=2, moe_target=WORDS), randomise_factors)
    ours, others = (
        {
            f"{name}.".replace(f".{adapter}.", ".")
            for name, _ in model.named_parameters()
            if f".{adapter}." in f"{name}."
        }
        for adapter in ("default", "second")
    )
    if ours != others:
        raise CheckError(f"the second adapter adapts other modules than the first: {sorted(ours ^ others)[:3]}")
    model.delete_adapter("default")
    model.set_adapter("second")
    require_equal(output_of(model), second, "output of the second adapter after the first was deleted")


def selection(model_type: str) -> None:
    """With factors for some experts only: the same as merged weights, and the other experts are not touched."""
    stock = stock_model(model_type).requires_grad_(False)
    selected = some_experts(stock)
    if not selected:
        return  # experts that are rows of larger matrices
    options: dict[str, Any] = {"moe_target": ["experts"], "selected_experts": selected}
    model = _adapted(copy.deepcopy(stock), **options, rank_pattern=_ranks(selected))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = output_of(model)
    expected = merged_output(model, stock, output_of)
    require_close(found, expected, "output with some experts selected")
    direction = direction_of(expected)
    require_close_gradients(
        factors, gradients_of(found, factors, direction), gradients_of(expected, factors, direction)
    )
    merged = model.merge_and_unload()
    for name, experts in selected.items():
        changed = changed_experts(stock.get_submodule(name), merged.get_submodule(name))
        if changed != experts:
            raise CheckError(f"merging changed the experts {changed} of {name} instead of {experts}")


def _ranks(selected: dict[str, list[int]]) -> dict[str, int]:
    """Twice the rank of the others for the first chosen expert of every layer."""
    return {f"{name}.{experts[0]}": 6 for name, experts in selected.items()}


def dropout(model_type: str) -> None:
    """The masks of the grouped kernel are those of the reference, and they matter."""
    outputs = {}
    for kernel in ("grouped", "reference"):
        model = _adapted(stock_model(model_type), lora_dropout=0.5, kernel=kernel, moe_target=["experts"])
        outputs["without"] = output_of(model)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.train()
        outputs[kernel] = output_of(model)
    require_close(outputs["grouped"], outputs["reference"], "output with dropout")
    has_stacks = any(isinstance(layer, MoeLoraExperts) for layer in model.modules())
    if has_stacks and relative_error(outputs["grouped"], outputs["without"]) < 1e-3:
        raise CheckError("dropout changes nothing")


def checkpointing(model_type: str) -> None:
    """Gradient checkpointing, which computes a layer twice, gives the same gradients, with dropout too."""
    promises.keeps_checkpointing(_adapted(stock_model(model_type), lora_dropout=0.2).train())


def bfloat16(model_type: str) -> None:
    """Every layer of experts in bfloat16 is as near to float64 as a handful of roundings allows, gradients too."""
    model = _adapted(build(model_type, torch.bfloat16), moe_target=["experts"])
    for layer in model.modules():
        if isinstance(layer, MoeLoraExperts):
            found, expected = compare(layer)
            for name, value in expected.items():
                require_close(found[name], value, f"{name} of one layer in bfloat16", BFLOAT16)


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (identity, reference, merge, reload, two_adapters, selection, dropout, checkpointing, bfloat16)
}


def _adapted(stock: nn.Module, **options: Any) -> PeftModel:
    """`stock` with an adapter of all its parts, whose factors are far from zero."""
    is_new = options.pop("init_lora_weights", False)
    config = MoeLoraConfig(**{"r": 3, "lora_alpha": 5, "moe_target": WORDS, "init_lora_weights": is_new} | options)
    model = get_peft_model(stock, config, autocast_adapter_dtype=False).eval()
    if not is_new:
        randomise_factors(model, "default", seed=3)
    return model
