"""The hooks that a plug-in can implement, and the two pluggy markers.

A plug-in is any module or object that an entry point of the group `trl_moe_ext` names. It decorates its functions with
`hookimpl`. The built-ins register through the same hooks (see `trl_moe_ext/plugins.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from trl_moe_ext.experts.registry import ExpertsFamily
    from trl_moe_ext.grpo.backends.protocol import RegisteredBackend
    from trl_moe_ext.kernels.registry import Kernel
    from trl_moe_ext.router.losses import RouterLoss

__all__ = ["PROJECT", "RECORD_TYPES", "hookimpl", "hookspec"]

PROJECT = "trl_moe_ext"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

# What a hook's records are instances of, by name: the host checks them without importing torch beforehand.
RECORD_TYPES = {
    "register_kernels": "trl_moe_ext.kernels.registry:Kernel",
    "register_experts_families": "trl_moe_ext.experts.registry:ExpertsFamily",
    "register_router_losses": "trl_moe_ext.router.losses:RouterLoss",
    "register_rollout_backends": "trl_moe_ext.grpo.backends.protocol:RegisteredBackend",
}


@hookspec
def register_kernels() -> Sequence[Kernel]:
    """Implementations of the expert MLP with low-rank updates, each a `Kernel` with a unique `name`."""
    raise NotImplementedError("a hook specification is never called")


@hookspec
def register_experts_families() -> Sequence[ExpertsFamily]:
    """Families whose experts structure alone does not tell, each an `ExpertsFamily` with a unique `name`."""
    raise NotImplementedError("a hook specification is never called")


@hookspec
def register_router_losses() -> Sequence[RouterLoss]:
    """Losses on the routing, per layer over the global batch, each a `RouterLoss` with a unique `name`."""
    raise NotImplementedError("a hook specification is never called")


@hookspec
def register_rollout_backends() -> Sequence[RegisteredBackend]:
    """Where the completions of async GRPO come from, each a `RegisteredBackend` with a unique `name`."""
    raise NotImplementedError("a hook specification is never called")
