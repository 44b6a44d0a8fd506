"""Sums over all processes, in one call for all routers of a model.

Every process makes the same calls with tensors of the same sizes, also where it saw nothing: a router that one process
did not pass, another one may have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from trl_moe_ext.router.routers import Router
from trl_moe_ext.router.statistics import LayerStatistics

__all__ = ["Reduce", "drift_sizes", "layer_sizes", "sum_over_processes", "sum_vectors"]

# The sum of a float64 tensor over all processes.
Reduce = Callable[[Tensor], Tensor]


def sum_over_processes(
    layers: Mapping[str, LayerStatistics], routers: Sequence[Router], reduce: Reduce
) -> dict[str, LayerStatistics]:
    """Statistics of all routers by label; zeros for one that no process passed."""
    vectors = [layers[router.label].as_vector() if router.label in layers else None for router in routers]
    summed = sum_vectors(vectors, layer_sizes(routers), reduce)
    return {router.label: LayerStatistics.from_vector(v) for router, v in zip(routers, summed, strict=True)}


def sum_vectors(vectors: Sequence[Tensor | None], sizes: Sequence[int], reduce: Reduce) -> list[Tensor]:
    """The sum of each vector over the processes; zeros stand for None.

    Args:
        vectors: of one dimension, on any devices.
        sizes: of the vectors.
        reduce: see `Reduce`.
    """
    known = next((vector for vector in vectors if vector is not None), torch.zeros(0, dtype=torch.float64))
    packed = torch.cat(
        [
            known.new_zeros(size) if vector is None else vector.to(known)
            for vector, size in zip(vectors, sizes, strict=True)
        ]
    )
    return list(torch.split(reduce(packed), list(sizes)))


def layer_sizes(routers: Sequence[Router]) -> list[int]:
    """Lengths of the vectors of `LayerStatistics`: counts and probabilities of the experts, and three sums."""
    return [2 * router.num_experts + 3 for router in routers]


def drift_sizes(routers: Sequence[Router]) -> list[int]:
    """Lengths of the vectors of `DriftStatistics`."""
    return [4] * len(routers)
