"""Models that are compared, and how far apart two of their results may be; for the checks of every tuner.

The models are float64 where a whole model is compared: in a smaller dtype rounding may send a token to another expert,
and nothing could be told from the difference.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_moe_ext.experts.census import tensors
from trl_moe_ext.experts.census.tiny import build

# Relative errors. Some families round to float32 in places, even where all weights are float64; it shows most in the
# gradient of a router, which is a small difference of large terms. bfloat16: a handful of roundings of 2^-9.
OUTPUT, GRADIENT, BFLOAT16 = 1e-6, 1e-3, 2e-2


class CheckError(AssertionError):
    """A promise is broken; the message says which and by how much."""


def stock_model(model_type: str) -> PreTrainedModel:
    """A family's own tiny model."""
    model = build(model_type, torch.float64)
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    for config in configs:
        config._experts_implementation = "eager"  # the only one of transformers that takes float64
    return model


def output_without_adapters(model: PeftModel) -> Tensor:
    """As `output_of`, with the adapters disabled."""
    with model.disable_adapter():
        return output_of(model)


def output_of(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """The output for the inputs of the census, or for others."""
    # Diffusion models draw noise in their forward, dropout draws its seed.
    torch.manual_seed(0)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return tensors.output(model, tensors.inputs(base) if inputs is None else inputs)


def direction_of(out: Tensor) -> Tensor:
    """Random numbers of the shape of an output, the same ones for the same shape: its gradient in a comparison."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)


def gradients_of(out: Tensor, factors: dict[str, Tensor], direction: Tensor | None = None) -> list[Tensor]:
    """Of every factor; zero for those that the output does not depend on, such as those of experts nobody chose."""
    found = torch.autograd.grad(out, list(factors.values()), direction, allow_unused=True)
    return [torch.zeros_like(f) if g is None else g for f, g in zip(factors.values(), found, strict=True)]


def require_close_gradients(factors: dict[str, Tensor], found: list[Tensor], expected: list[Tensor]) -> None:
    """Raise CheckError for the first gradient that is too far from what is expected."""
    # A gradient that vanishes, as that of a router whose only chosen weight is normalised to one, is all rounding.
    floor = 1e-4 * max(float(gradient.norm()) for gradient in expected)
    for name, ours, theirs in zip(factors, found, expected, strict=True):
        require_close(ours, theirs, f"gradient of {name}", GRADIENT, floor)


def relative_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """``||found - expected|| / max(||expected||, floor)`` in float64; huge where only the expected tensor vanishes."""
    found, expected = found.detach().double(), expected.detach().double()
    difference = float((found - expected).norm())
    return difference / max(float(expected.norm()), floor, 1e-300) if difference else 0.0


def require_close(found: Tensor, expected: Tensor, what: str, limit: float = OUTPUT, floor: float = 0.0) -> None:
    """Raise CheckError above a relative error of `limit`."""
    error = relative_error(found, expected, floor)
    if not error <= limit:
        raise CheckError(f"{what}: relative error {error:.1e} > {limit:.0e}")


def require_equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise CheckError if a bit differs."""
    if not torch.equal(found, expected):
        raise CheckError(f"{what}: differs, relative error {relative_error(found, expected):.1e}")
