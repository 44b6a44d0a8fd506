"""Balancing without a loss: a bias that only takes part in the choice of experts is moved by their load.

Legend: E experts of the router.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_moe_ext.errors import ConfigError


@torch.no_grad()
def bias_step(bias: Tensor, tokens_per_expert: Tensor, rate: float) -> Tensor:
    """The bias after one optimisation step: up by ``rate`` for experts below the mean load, down for those above it.

    The update of arXiv 2408.15664 (algorithm 1), which uses a rate of 0.001 with sigmoid scores. An expert at the mean
    keeps its bias, so a step without tokens changes nothing.

    Args:
        bias: ``(E,)`` float32 or wider, as it was in the step; left unchanged.
        tokens_per_expert: ``(E,)`` whole numbers of any dtype, choices of each expert in the whole step, on all
            processes.
        rate: size of the step, in the units of the scores.

    Raises:
        ConfigError: the bias is kept in half precision, in which steps of the usual size are lost to rounding.
    """
    if torch.promote_types(bias.dtype, torch.float32) != bias.dtype:
        raise ConfigError(
            f"a balancing bias of {bias.dtype} loses steps of {rate:g} to rounding; keep it in float32 (bias.float())"
        )
    # Integers: a mean in floating point can miss an exactly balanced load by a rounding, which the sign would blow up.
    choices = tokens_per_expert.to(torch.int64)
    shortage = choices.sum() - choices.numel() * choices
    return bias + rate * shortage.sign().to(bias.dtype)
