"""What a kernel plug-in provides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """An implementation of the MLP of routed experts, chosen by name with ``MoeLoraConfig(kernel=...)``.

    Attributes:
        name: the word that selects it.
        description: one line for ``trl-moe plugins``.
        experts_mlp: a function with the signature and the meaning of `trl_moe_ext.kernels.experts_mlp.experts_mlp`.
        chooses_activations: whether the function has a keyword ``save_activations``, as `fused_experts_mlp` has;
            a kernel without it is refused where the user asks for something else than ``gate_up``.
        takes_selection: whether the function knows `LowRank.selected`; a kernel without it is refused where experts
            are selected.
    """

    name: str
    description: str
    experts_mlp: Callable[..., Tensor]
    chooses_activations: bool = False
    takes_selection: bool = False
