"""What MOE_LORA promises on every family: one function a promise, which builds its own models and raises if broken.

The models are float64 where a whole model is compared: in a smaller dtype rounding may send a token to another expert,
and nothing could be told from the difference. Rounding is the subject of `bfloat16`, which compares single layers.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.experts.census import tensors
from trl_moe_ext.experts.census.calls import compare
from trl_moe_ext.experts.census.merged import merged_output
from trl_moe_ext.experts.census.selecting import changed_experts, some_experts
from trl_moe_ext.experts.census.tiny import build
from trl_moe_ext.experts.census.weights import randomise_factors
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts
from trl_moe_ext.tuners.targets.options import TARGET_WORDS

WORDS = list(TARGET_WORDS)
# Relative errors. Some families round to float32 in places, even where all weights are float64; it shows most in the
# gradient of a router, which is a small difference of large terms. bfloat16: a handful of roundings of 2^-9.
OUTPUT, GRADIENT, BFLOAT16 = 1e-6, 1e-3, 2e-2


class CheckError(AssertionError):
    """A promise is broken; the message says which and by how much."""


def identity(model_type: str) -> None:
    """A new adapter changes nothing."""
    stock = _stock(model_type)
    expected = _output(stock)
    _close(_output(_adapted(stock, init_lora_weights=True)), expected, "output of a new adapter")


def reference(model_type: str) -> None:
    """Output and every gradient are those of the family's own code with merged weights."""
    stock = _stock(model_type).requires_grad_(False)
    model = _adapted(copy.deepcopy(stock))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # In this order: some families change the dtype of a weight when they are first called.
    unadapted, found = _output(stock), _output(model)
    expected = merged_output(model, stock, _output)
    _close(found, expected, "output")
    if _relative_error(unadapted, expected) < 1e-3:
        raise CheckError("the adapter does not change the output: nothing was tested")
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=expected.dtype)
    _close_gradients(factors, _gradients(found, factors, direction), _gradients(expected, factors, direction))


def merge(model_type: str) -> None:
    """Merged weights give the same output, unmerging gives the old weights back, and unloading leaves no trace."""
    stock = _stock(model_type)
    before, classes = copy.deepcopy(stock.state_dict()), [type(m) for m in stock.modules()]
    model = _adapted(stock)
    expected = _output(model)
    base = _disabled(model)
    model.merge_adapter()
    _close(_output(model), expected, "output with merged weights")
    _close(_disabled(copy.deepcopy(model)), base, "output without the adapter while it is merged")
    model.unmerge_adapter()
    _close(_output(model), expected, "output after unmerging")
    merged = model.merge_and_unload(safe_merge=True)
    _close(_output(merged), expected, "output of the merged model")
    if [type(m) for m in merged.modules()] != classes or merged.state_dict().keys() != before.keys():
        raise CheckError("the merged model has other modules or weights than the stock one")


def reload(model_type: str) -> None:
    """A saved adapter, loaded by PEFT or by transformers itself, gives the same output to the last bit."""
    stock = _stock(model_type)
    with tempfile.TemporaryDirectory() as directory:
        model = _adapted(copy.deepcopy(stock))
        model.save_pretrained(directory)
        expected = _output(model)
        loaded = PeftModel.from_pretrained(copy.deepcopy(stock), directory, autocast_adapter_dtype=False).eval()
        _equal(_output(loaded), expected, "output after PeftModel.from_pretrained")
        stock.load_adapter(directory)
        _equal(_output(stock.eval()), expected, "output after model.load_adapter")


def two_adapters(model_type: str) -> None:
    """Adapters of different rank on one model: each alone, both together, one deleted."""
    model = _adapted(_stock(model_type))
    first = _output(model)
    model.add_adapter("second", MoeLoraConfig(r=2, moe_target=WORDS))
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
    _equal(_output(model), first, "output of the first adapter beside a second one")
    randomise_factors(model, "second", seed=7)
    model.set_adapter("second")
    second = _output(model)
    if _relative_error(second, first) < 1e-3:
        raise CheckError("both adapters give the same output")
    model.base_model.set_adapter(["default", "second"])
    both = _output(model)
    if min(_relative_error(both, first), _relative_error(both, second)) < 1e-3:
        raise CheckError("two active adapters give the output of one")
    model.delete_adapter("default")
    model.set_adapter("second")
    _equal(_output(model), second, "output of the second adapter after the first was deleted")


def selection(model_type: str) -> None:
    """With factors for some experts only: the same as merged weights, and the other experts are not touched."""
    stock = _stock(model_type).requires_grad_(False)
    selected = some_experts(stock)
    if not selected:
        return  # experts that are rows of larger matrices
    options: dict[str, Any] = {"moe_target": ["experts"], "selected_experts": selected}
    model = _adapted(copy.deepcopy(stock), **options, rank_pattern=_ranks(selected))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = _output(model)
    expected = merged_output(model, stock, _output)
    _close(found, expected, "output with some experts selected")
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5), dtype=expected.dtype)
    _close_gradients(factors, _gradients(found, factors, direction), _gradients(expected, factors, direction))
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
        model = _adapted(_stock(model_type), lora_dropout=0.5, kernel=kernel, moe_target=["experts"])
        outputs["without"] = _output(model)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.train()
        outputs[kernel] = _output(model)
    _close(outputs["grouped"], outputs["reference"], "output with dropout")
    has_stacks = any(isinstance(layer, MoeLoraExperts) for layer in model.modules())
    if has_stacks and _relative_error(outputs["grouped"], outputs["without"]) < 1e-3:
        raise CheckError("dropout changes nothing")


def checkpointing(model_type: str) -> None:
    """Gradient checkpointing, which computes a layer twice, gives the same gradients, with dropout too."""
    model = _adapted(_stock(model_type), lora_dropout=0.2).train()
    base = model.get_base_model()
    has_layers = any(hasattr(module, "gradient_checkpointing") for module in base.modules())
    if not (has_layers and base.supports_gradient_checkpointing):
        return  # the family has none
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = _gradients(_output(model).square().mean(), factors)
    # Its name from transformers 5.23 on, and the one before.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    _close_gradients(factors, _gradients(_output(model).square().mean(), factors), plain)


def bfloat16(model_type: str) -> None:
    """Every layer of experts in bfloat16 is as near to float64 as a handful of roundings allows, gradients too."""
    model = _adapted(build(model_type, torch.bfloat16), moe_target=["experts"])
    for layer in model.modules():
        if isinstance(layer, MoeLoraExperts):
            found, expected = compare(layer)
            for name, value in expected.items():
                _close(found[name], value, f"{name} of one layer in bfloat16", BFLOAT16)


CHECKS: dict[str, Callable[[str], None]] = {
    check.__name__: check
    for check in (identity, reference, merge, reload, two_adapters, selection, dropout, checkpointing, bfloat16)
}


def _stock(model_type: str) -> PreTrainedModel:
    model = build(model_type, torch.float64)
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    for config in configs:
        config._experts_implementation = "eager"  # the only one of transformers that takes float64
    return model


def _adapted(stock: nn.Module, **options: Any) -> PeftModel:
    """`stock` with an adapter of all its parts, whose factors are far from zero."""
    is_new = options.pop("init_lora_weights", False)
    config = MoeLoraConfig(**{"r": 3, "lora_alpha": 5, "moe_target": WORDS, "init_lora_weights": is_new} | options)
    model = get_peft_model(stock, config, autocast_adapter_dtype=False).eval()
    if not is_new:
        randomise_factors(model, "default", seed=3)
    return model


def _disabled(model: PeftModel) -> Tensor:
    with model.disable_adapter():
        return _output(model)


def _output(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    # Diffusion models draw noise in their forward, dropout draws its seed.
    torch.manual_seed(0)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return tensors.output(model, tensors.inputs(base) if inputs is None else inputs)


def _gradients(out: Tensor, factors: dict[str, Tensor], direction: Tensor | None = None) -> list[Tensor]:
    """Of every factor; zero for those that the output does not depend on, such as those of experts nobody chose."""
    found = torch.autograd.grad(out, list(factors.values()), direction, allow_unused=True)
    return [torch.zeros_like(f) if g is None else g for f, g in zip(factors.values(), found, strict=True)]


def _close_gradients(factors: dict[str, Tensor], found: list[Tensor], expected: list[Tensor]) -> None:
    # A gradient that vanishes, as that of a router whose only chosen weight is normalised to one, is all rounding.
    floor = 1e-4 * max(float(gradient.norm()) for gradient in expected)
    for name, ours, theirs in zip(factors, found, expected, strict=True):
        _close(ours, theirs, f"gradient of {name}", GRADIENT, floor)


def _relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """``||found - expected|| / max(||expected||, floor)`` in float64; huge where only the expected tensor vanishes."""
    found, expected = found.detach().double(), expected.detach().double()
    difference = float((found - expected).norm())
    return difference / max(float(expected.norm()), floor, 1e-300) if difference else 0.0


def _close(found: Tensor, expected: Tensor, what: str, limit: float = OUTPUT, floor: float = 0.0) -> None:
    error = _relative_error(found, expected, floor)
    if not error <= limit:
        raise CheckError(f"{what}: relative error {error:.1e} > {limit:.0e}")


def _equal(found: Tensor, expected: Tensor, what: str) -> None:
    if not torch.equal(found, expected):
        raise CheckError(f"{what}: differs, relative error {_relative_error(found, expected):.1e}")
