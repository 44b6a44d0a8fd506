"""Losses on the routing, and the record by which a plug-in adds one.

A loss looks at one router and one micro-batch and returns the micro-batch's share of the loss over the whole
optimisation step: shares of micro-batches and of processes are summed, never averaged.

Legend: T tokens of a forward, E experts of the router.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_moe_ext.router.tokens import only_kept

__all__ = ["LossInput", "RouterLoss", "drift_kl", "kl_divergence", "load_balancing", "z_loss"]


@dataclass(frozen=True)
class LossInput:
    """One router and one micro-batch, with what is known of the whole optimisation step.

    The step is all micro-batches of gradient accumulation on all processes.

    Attributes:
        logits: ``(T, E)``, any dtype, with a graph.
        probabilities: ``(T, E)`` float32, with a graph; each row sums to one.
        kept: ``(T,)`` bool, False on padding; None if every token counts. Rows that do not count may hold anything.
        tokens_per_expert: ``(E,)``, how many tokens of the step chose each expert; sums to top_k * num_tokens.
        num_tokens: tokens of the step, without padding.
        top_k: experts that a token chooses.
        base_probabilities: ``(T, E)`` float32 of the model without its adapters; None unless the loss `needs_base`.
    """

    logits: Tensor
    probabilities: Tensor
    kept: Tensor | None
    tokens_per_expert: Tensor
    num_tokens: float
    top_k: int
    base_probabilities: Tensor | None = None

    def mean_over_tokens(self, values: Tensor) -> Tensor:
        """This micro-batch's share of the mean of ``values`` ``(T, ...)`` over the tokens of the step, ``(...)``."""
        # A step without a token has a share of exactly zero, not 0/0.
        return only_kept(values, self.kept).sum(0) / max(self.num_tokens, 1.0)


@dataclass(frozen=True)
class RouterLoss:
    """A loss on the routing, chosen by name with ``MoeSFTConfig(router_losses={NAME: coefficient})``.

    The trainer takes the mean over the layers and multiplies by the coefficient.

    Attributes:
        name: the word that selects it.
        description: one line for ``trl-moe plugins``.
        function: from one router and one micro-batch to the micro-batch's share: a scalar, float32, with a graph.
        needs_base: whether it reads ``base_probabilities``, which cost one more forward without the adapters.
        needs_counts: whether it reads ``tokens_per_expert``, which is only complete once the routing of every
            micro-batch of the step is known.
        needs_logits: whether it has no meaning for routers that hand out probabilities in the place of logits.
    """

    name: str
    description: str
    function: Callable[[LossInput], Tensor]
    needs_base: bool = False
    needs_counts: bool = False
    needs_logits: bool = False


def load_balancing(routed: LossInput) -> Tensor:
    """Load balancing over the global batch: ``E * sum_e f_e P_e``.

    ``f_e`` is the number of choices of expert e for each token of the step and ``P_e`` its mean probability in the
    step. Only ``P_e`` has a gradient. A balanced routing has the value top_k, as in transformers' loss for one layer.

    The form is that of Switch Transformer (arXiv 2101.03961, equations 4 to 6); that the counts must be those of the
    global batch is shown in arXiv 2501.11873.
    """
    probabilities = at_least_float32(routed.probabilities)
    choices = routed.tokens_per_expert.detach().to(probabilities) / max(routed.num_tokens, 1.0)
    return probabilities.shape[-1] * (choices * routed.mean_over_tokens(probabilities)).sum()


def z_loss(routed: LossInput) -> Tensor:
    """Mean of the squared ``logsumexp`` of the logits: keeps them small (ST-MoE, arXiv 2202.08906, equation 5)."""
    logits = only_kept(at_least_float32(routed.logits), routed.kept)
    return routed.mean_over_tokens(logits.logsumexp(-1).square())


def drift_kl(routed: LossInput) -> Tensor:
    """Mean of KL(base || now): holds the routing near that of the model without its adapters. In nats."""
    assert routed.base_probabilities is not None, "drift_kl needs base_probabilities, which its record asks for"
    now = only_kept(at_least_float32(routed.probabilities), routed.kept)
    return routed.mean_over_tokens(kl_divergence(routed.base_probabilities.detach(), now))


def kl_divergence(base: Tensor, now: Tensor) -> Tensor:
    """KL(base || now) of each row, in nats, ``(T,)``.

    Finite whatever the rows: below the smallest normal number (1e-38 in float32) a probability counts as that number
    and has no gradient. Exactly zero where both rows are the same.

    Args:
        base: ``(T, E)``, rows that sum to one.
        now: ``(T, E)``, rows that sum to one.
    """
    smallest = torch.finfo(now.dtype).tiny
    return (base * (base.clamp_min(smallest).log() - now.clamp_min(smallest).log())).sum(-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32; wider types as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
