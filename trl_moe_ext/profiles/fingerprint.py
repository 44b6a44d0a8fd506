"""A few numbers of a router's weights, which tell checkpoints apart that have the same shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from trl_moe_ext.router.places import Place

__all__ = ["fingerprint", "is_same"]

NUMBERS = 8

# bfloat16 keeps 8 bits: what it rounds is at most 2**-9 of a number.
_RELATIVE = 2**-8
# Below it float16 keeps fewer bits.
_ABSOLUTE = 1e-6


def fingerprint(places: Mapping[str, Place], router: str) -> tuple[float, ...]:
    """Some numbers of the largest matrix of a router without adapters, always from the same positions.

    Args:
        places: of the model, see `read_places`.
        router: its name there.

    Returns:
        `NUMBERS` numbers; none if the router has no matrix in at least 16 bits that is in memory.
    """
    matrix = max(_matrices(places, router), key=lambda parameter: parameter.numel(), default=None)
    if matrix is None or not matrix.numel():
        return ()
    positions = [(2 * number + 1) * matrix.numel() // (2 * NUMBERS) for number in range(NUMBERS)]
    return tuple(matrix.detach().reshape(-1)[positions].float().tolist())


def is_same(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two fingerprints are of the same weights up to the rounding of their dtypes, or one is empty."""
    pairs = zip(one, other, strict=False)
    return all(math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) for a, b in pairs)


def _matrices(places: Mapping[str, Place], router: str) -> Iterator[Tensor]:
    for name, place in places.items():
        if name == router or name.startswith(f"{router}."):
            yield from filter(_can_be_read, _parameters(place.module))


def _parameters(module: nn.Module) -> Iterator[Tensor]:
    # Adapters of the router are modules of their own, which `read_places` leaves out.
    return module.parameters(recurse=False)


def _can_be_read(parameter: Tensor) -> bool:
    is_matrix = parameter.ndim == 2 and parameter.is_floating_point() and parameter.element_size() > 1
    return is_matrix and not parameter.is_meta
