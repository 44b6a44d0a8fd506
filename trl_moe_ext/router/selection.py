"""Run a router with a bias on its experts that takes part in their choice and in nothing else.

Balancing without a loss (arXiv 2408.15664) moves such a bias. There are three ways to bring one in, and which of them
works for a router is found by `selection_probe`:

- the router has a bias of that kind itself, as DeepSeek-V3's ``e_score_correction_bias``: the sum takes its place;
- its block hands it one, as MiniMax-M2's does: it is called with the sum;
- it has none and picks its experts with `torch.topk`: the picking sees scores with the bias, all else those without.

In each the family's own code does all the rest: groups of experts, normalised weights, scales of single experts.

Legend: T tokens, K top_k, E experts of the router.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["BiasedTopK", "GivenBias", "OwnBias", "SelectionBias", "TopKBias"]


class SelectionBias(Protocol):
    """A way to bring a bias in."""

    def run(self, router: nn.Module, bias: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the router returns for these arguments, with ``bias`` ``(E,)`` added to what it has of its own."""

    def stored(self, router: nn.Module, block: nn.Module) -> Tensor | None:
        """The tensor of the family that a bias can be added to for good, or None if there is none.

        Args:
            router: the module that runs.
            block: the module that calls it.
        """


@dataclass(frozen=True)
class OwnBias:
    """The router has such a bias.

    Attributes:
        name: of the buffer or parameter, as seen from the router: ``e_score_correction_bias``.
    """

    name: str

    def run(self, router: nn.Module, bias: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """See `SelectionBias.run`."""
        with _in_place_of(router, self.name, _sum(_tensor(router, self.name), bias)):
            return router.forward(*args, **kwargs)

    def stored(self, router: nn.Module, block: nn.Module) -> Tensor | None:
        """See `SelectionBias.stored`."""
        return _tensor(router, self.name)


@dataclass(frozen=True)
class GivenBias:
    """The block has such a bias and calls the router with it.

    Attributes:
        name: of the block's buffer or parameter, and of the router's argument.
    """

    name: str

    def run(self, router: nn.Module, bias: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """See `SelectionBias.run`."""
        call = inspect.signature(router.forward).bind(*args, **kwargs)
        call.arguments[self.name] = _sum(call.arguments[self.name], bias)
        return router.forward(*call.args, **call.kwargs)

    def stored(self, router: nn.Module, block: nn.Module) -> Tensor | None:
        """See `SelectionBias.stored`."""
        return _tensor(block, self.name)


@dataclass(frozen=True)
class TopKBias:
    """The router has none."""

    def run(self, router: nn.Module, bias: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """See `SelectionBias.run`."""
        with BiasedTopK(bias):
            return router.forward(*args, **kwargs)

    def stored(self, router: nn.Module, block: nn.Module) -> Tensor | None:
        """See `SelectionBias.stored`."""
        return None


class BiasedTopK(TorchFunctionMode):
    """Inside, `torch.topk` over E experts picks by scores plus bias, and returns scores without it.

    Args:
        bias: ``(E,)``.

    Attributes:
        scores: what the last of these calls picked from, ``(..., E)``; None before the first.
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.scores: Tensor | None = None
        self._bias = bias

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.topk, Tensor.topk):
            return self._topk(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _topk(self, input: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        if not largest or dim not in (-1, input.ndim - 1) or input.shape[-1] != self._bias.numel():
            return torch.topk(input, k, dim, largest, sorted)
        self.scores = input.detach()
        index = torch.topk(_sum(self.scores, self._bias), k, dim, sorted=sorted).indices
        return torch.return_types.topk((input.gather(-1, index), index))


def _sum(own: Tensor, bias: Tensor) -> Tensor:
    """In float32 at least: steps of a bias are lost in half precision."""
    wide = torch.promote_types(own.dtype, bias.dtype)
    return own.detach().to(wide) + bias.to(own.device, wide)


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), last)
    return tensor


@contextmanager
def _in_place_of(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Another tensor in the place of a buffer or parameter."""
    path, _, last = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    tensors = owner._buffers if last in owner._buffers else owner._parameters
    kept = tensors[last]
    tensors[last] = value
    try:
        yield
    finally:
        tensors[last] = kept
