"""The loss of tokens that another policy drew: policy gradient with constant importance weights.

``-w A exp(log p - stop(log p))``, of each token: its value is ``-w A``, its gradient ``-w A`` times that of ``log p``.
Uncapped weights of tokens, ``p / q`` with the generator's probability ``q``, give the gradient of ``-A p / q``, which
is TRL's loss without clipping; a cap bounds a token's weight and keeps its gradient, where clipping drops it.

Legend: M tokens that are trained on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trl_moe_ext.grpo.loss.importance import Corrected

__all__ = ["mean_of_step", "policy_loss"]


def policy_loss(log_probs: Tensor, advantages: Tensor, corrected: Corrected) -> Tensor:
    """The loss of each token; 0, without a gradient, where `corrected` has masked it.

    Args:
        log_probs: ``(M,)``, by the policy that is trained, with a graph.
        advantages: ``(M,)``.
        corrected: of the same tokens.

    Returns:
        ``(M,)``, float32 or wider.
    """
    # Masked tokens are left out before the exponential: its derivative at a NaN is a NaN, even times zero.
    shift = torch.where(corrected.mask, log_probs - log_probs.detach(), 0)
    return corrected.apply(-advantages * shift.exp())


def mean_of_step(losses: Tensor, num_tokens: Tensor, processes: int, accumulation: int) -> Tensor:
    """What a process adds to the loss of a step for one of its micro-batches, as TRL's trainer has it.

    Args:
        losses: ``(M,)``, of the tokens of this process.
        num_tokens: ``()``, those of the micro-batch in all processes.
        processes: over which the gradients are averaged.
        accumulation: micro-batches of a step.
    """
    tokens = (num_tokens / processes).clamp(min=1.0).to(losses.dtype)
    return losses.sum() / tokens / accumulation
