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
    """

    name: str
    description: str
    experts_mlp: Callable[..., Tensor]
