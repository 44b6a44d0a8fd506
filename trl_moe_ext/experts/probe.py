"""Compare an inferred layout with the module itself: names and shapes may suggest what is not so."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts.layout import ExpertsLayout, expert_weights, stack_of
from trl_moe_ext.kernels.reference import experts_mlp_reference

_TOKENS = 4
# Relative error that rounding explains, with room: a wrong reading is off by about one.
_TOLERANCE = 0.05


# What a typical token makes of the first projection, and what reaches beyond the bounds of a clamp.
_SIZES = (1.0, 30.0)


@torch.no_grad()
def check_reading(module: nn.Module, layout: ExpertsLayout) -> None:
    """Run a few random tokens through `module` and through its weights as `layout` reads them.

    Modules whose layout is not inferred, and those without weights yet (on the meta device), are not asked.

    Raises:
        LayoutError: the outputs differ or vanish, or the module cannot be called as its signature says.
    """
    weight = stack_of(module, layout.projections[0])
    if not layout.is_inferred or weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(_TOKENS, layout.up.in_features, generator=generator, device="cpu")
    scores = torch.rand(_TOKENS, layout.num_experts, generator=generator, device="cpu")
    index = scores.topk(min(2, layout.num_experts)).indices.to(weight.device)
    routing = torch.rand(index.shape, generator=generator, device="cpu").to(weight)
    # With weights of this size each, a sum over the input features has the size of their root mean square. Those of
    # the experts that the first token goes to are enough: a copy of a stack may be larger than what memory is left.
    unit = tokens / (float(weight[index[0]].float().square().mean()) * layout.up.in_features) ** 0.5
    for size in _SIZES:
        _compare(module, layout, (unit * size).to(weight), index, routing)


def _compare(module: nn.Module, layout: ExpertsLayout, tokens: Tensor, index: Tensor, routing: Tensor) -> None:
    stacks = expert_weights(module, layout)
    expected = experts_mlp_reference(tokens, index, routing, stacks, up_updates=(), down_updates=())
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        # The class's forward: hooks are not called for a comparison.
        found = type(module).forward(module, tokens, index, routing).reshape(expected.shape)
    except Exception as error:
        raise LayoutError(f"{_reading(module)}, but calling it fails: {error!r}. {_ADVICE}") from error
    finally:
        for part, is_training in modes.items():
            part.training = is_training
    norm = float(expected.float().norm())
    difference = float((found - expected).float().norm())
    # Also if both vanish or are not a number: then nothing was compared.
    if norm == 0.0 or not difference <= _TOLERANCE * norm:
        raise LayoutError(f"{_reading(module)}, but calling it gives another result. {_ADVICE}")


_ADVICE = (
    "Describe it in a plug-in (hook register_experts_families, see docs/families.md), or leave 'experts' out of "
    "moe_target"
)


def _reading(module: nn.Module) -> str:
    shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in module.named_parameters())
    return f"{type(module).__name__} ({shapes}) looks like a module of stacked experts"
