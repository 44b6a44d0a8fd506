"""Random weights for a tiny model: none of them constant, all of a size that keeps activations of order one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trl_moe_ext.experts.census.rules import HIDDEN, WEIGHT_STD

_NOISE = 0.1


@torch.no_grad()
def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Make the weights and persistent buffers of `model` random where its own initialisation leaves them constant.

    A bias of zero, a norm of one or a router's correction of zero hides an error in what is multiplied by it or added
    to it. What has more than a constant keeps it: some families start from a structure that they need.
    """
    for tensor in model.state_dict().values():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if not torch.isfinite(tensor).all():
            # Memory that the family's initialisation never wrote.
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * WEIGHT_STD)
        elif _is_constant(tensor):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * _NOISE)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features < HIDDEN:
            # Drawn for `HIDDEN` inputs. A router of several narrow layers would send every token to one expert.
            module.weight.mul_((HIDDEN / module.in_features) ** 0.5)
        _draw_tables(module, generator)


def _draw_tables(module: nn.Module, generator: torch.Generator) -> None:
    """Fill the tables ``(tokens, top_k)`` of a router that looks experts up, which are in the checkpoint only."""
    num_experts = getattr(module, "num_experts", None)
    for table in module.buffers(recurse=False):
        if num_experts and table.dtype == torch.long and table.ndim == 2 and _is_constant(table):
            table.copy_(torch.rand(len(table), num_experts, generator=generator).argsort(1)[:, : table.shape[1]])


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all())


def randomise_factors(model: nn.Module, adapter: str, seed: int) -> None:
    """Give an adapter low-rank factors large enough that dropping them could not pass for rounding."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in f"{name}.":
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.2).to(parameter)
