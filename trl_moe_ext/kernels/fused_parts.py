"""What the back ends of the fused expert MLP take and return.

Legend: T tokens, K top_k, S = T*K routed rows, E experts, H hidden, I intermediate, r rank.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from trl_moe_ext.kernels.gates import Gate
from trl_moe_ext.kernels.low_rank import Updates

# Of the up and the down projection: any number of updates that `are_apart`.
Factors = tuple[Updates, Updates]
# A and B, or their gradients, of each update of a projection.
PairsOfFactors = tuple[tuple[Tensor, Tensor], ...]


class Frozen(NamedTuple):
    """The frozen weights: up ``(E, H, 2I)`` or ``(E, H, I)``, down ``(E, I, H)``, biases, and the gate between.

    With `weights_on_input` the routing weights multiply an expert's input instead of its output.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    gate: Gate
    weights_on_input: bool = False


class Kept(NamedTuple):
    """What a forward leaves for its backward pass, in an order of rows of the back end's own.

    Attributes:
        h: ``(at least S, 2I)`` or ``(at least S, I)``, the output of the first projection; empty if it is not kept.
        up, down: ``(at least S, r)``, the rank-sized results of both projections, r the largest rank; empty without
            updates. What stands in rows of experts without one means nothing.
    """

    h: Tensor
    up: Tensor
    down: Tensor


class Gradients(NamedTuple):
    """Of tokens (None if not needed), routing weights, and the factors A and B of each update of both projections."""

    hidden: Tensor | None
    weights: Tensor
    up: PairsOfFactors
    down: PairsOfFactors
