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
    """The fused kernel, which is the default; the form of two functions; the loop that defines what is correct."""
    return (
        Kernel(
            "fused",
            "one function for the whole MLP, no merged weight and no expert weight gradient",
            fused_experts_mlp,
            chooses_activations=True,
            takes_selection=True,
        ),
        Kernel(
            "grouped",
            "a function for each projection, around the module's own activation",
            experts_mlp,
            takes_selection=True,
        ),
        Kernel(
            "reference",
            "one expert at a time in plain torch; slow, for checking other kernels",
            experts_mlp_reference,
            takes_selection=True,
        ),
    )
