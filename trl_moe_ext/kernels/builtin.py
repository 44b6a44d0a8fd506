"""The kernels that come with the package, registered through the hook that third parties use."""

from __future__ import annotations

from collections.abc import Sequence

from trl_moe_ext.hookspecs import hookimpl
from trl_moe_ext.kernels.experts_mlp import experts_mlp
from trl_moe_ext.kernels.fused import fused_experts_mlp
from trl_moe_ext.kernels.reference import experts_mlp_reference
from trl_moe_ext.kernels.registry import Kernel


@hookimpl
def register_kernels() -> Sequence[Kernel]:
    """The grouped kernel, which is the default, and the loop that defines what is correct."""
    return (
        Kernel("grouped", "grouped matrix products, no merged weight and no expert weight gradient", experts_mlp),
        Kernel(
            "fused",
            "one function for the whole MLP, on a CPU; less memory than grouped",
            fused_experts_mlp,
        ),
        Kernel(
            "reference", "one expert at a time in plain torch; slow, for checking other kernels", experts_mlp_reference
        ),
    )
