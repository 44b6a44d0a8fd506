"""What becomes of a bias for the choice of experts when its adapter is merged: a part of the family's own bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.places import running
from trl_moe_ext.tuners.moe_lora.router_bias import bias_of

if TYPE_CHECKING:
    from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts


def check_bias_mergeable(experts: MoeLoraExperts, adapter_name: str) -> None:
    """Raise ConfigError if an adapter has a bias, and the family has nothing that it could be added to."""
    bias = bias_of(experts, adapter_name)
    for router in experts.biased_routers if bias is not None and bias.any() else ():
        if router.stored is None:
            raise ConfigError(
                f"adapter {adapter_name!r} cannot be merged: its router_bias of {router.name!r} is not zero, and "
                f"{type(running(router.called)).__name__} has no bias that it could be added to; nothing was merged. "
                "Use the adapter unmerged, or train with router_aux_loss_coef in place of router_bias"
            )


@torch.no_grad()
def merge_bias(experts: MoeLoraExperts, adapter_name: str) -> None:
    """Add the bias of an adapter to the family's own."""
    bias = bias_of(experts, adapter_name)
    if bias is None:
        return
    for router in experts.biased_routers:
        if (stored := router.stored) is not None:
            router.merged.append((stored, stored.clone()))
            stored.copy_(stored.to(torch.promote_types(stored.dtype, bias.dtype)) + bias.to(stored.device))


@torch.no_grad()
def unmerge_bias(experts: MoeLoraExperts, adapter_name: str) -> None:
    """Undo the last `merge_bias`."""
    for router in experts.biased_routers if bias_of(experts, adapter_name) is not None else ():
        if router.merged:
            stored, before = router.merged.pop()
            stored.copy_(before)
