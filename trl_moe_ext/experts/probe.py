"""Compare an inferred layout with the module itself: names and shapes may suggest what is not so."""

from __future__ import annotations

import torch
from torch import nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts.layout import ExpertsLayout, expert_weights, stack_of
from trl_moe_ext.kernels.reference import experts_mlp_reference

_TOKENS = 4
# Relative error that rounding explains, with room: a wrong reading is off by about one.
_TOLERANCE = 0.05


@torch.no_grad()
def check_reading(module: nn.Module, layout: ExpertsLayout) -> None:
    """Run a few random tokens through `module` and through its weights as `layout` reads them.

    Modules whose layout is not inferred, and those without weights yet (on the meta device), are not asked.

    Raises:
        LayoutError: the outputs differ, or the module cannot be called as its signature says.
    """
    weight = stack_of(module, layout.projections[0])
    if not layout.is_inferred or weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(_TOKENS, layout.up.in_features, generator=generator).to(weight)
    index = torch.rand(_TOKENS, layout.num_experts, generator=generator).topk(min(2, layout.num_experts)).indices
    routing = torch.rand(index.shape, generator=generator).to(weight)
    expected = experts_mlp_reference(
        tokens, index.to(weight.device), routing, expert_weights(module, layout), up_updates=(), down_updates=()
    )
    is_training = module.training
    try:
        found = module.eval()(tokens, index.to(weight.device), routing).reshape(expected.shape)
    except Exception as error:
        raise LayoutError(f"{_reading(module)}, but calling it fails: {error!r}. {_ADVICE}") from error
    finally:
        module.train(is_training)
    if (found - expected).float().norm() > _TOLERANCE * expected.float().norm():
        raise LayoutError(f"{_reading(module)}, but calling it gives another result. {_ADVICE}")


_ADVICE = (
    "Describe it in a plug-in (hook register_experts_families, see docs/families.md), or leave 'experts' out of "
    "moe_target"
)


def _reading(module: nn.Module) -> str:
    shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in module.named_parameters())
    return f"{type(module).__name__} ({shapes}) looks like a module of stacked experts"
