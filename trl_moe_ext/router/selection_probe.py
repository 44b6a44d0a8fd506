"""Find out by experiment how a bias is brought into a router's choice: names may suggest what is not so.

The experiment is made with a copy of the router, with random weights, on random tokens: it takes no memory on the
device, and works for a model without weights yet.

Legend: T tokens, K top_k, E experts of the router.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trl_moe_ext.errors import ConfigError, LayoutError
from trl_moe_ext.router.reading import read_output
from trl_moe_ext.router.routers import Router
from trl_moe_ext.router.selection import BiasedTopK, GivenBias, OwnBias, SelectionBias, TopKBias

__all__ = ["find_selection_bias"]

_TOKENS = 64
# More than scores and logits of the experiment can differ by.
_LARGE = 100.0


def find_selection_bias(router: Router, block: nn.Module) -> SelectionBias:
    """The way to bring a bias into a router's choice of experts that changes its choice and nothing else.

    Args:
        router: of a model, with or without adapters.
        block: the module that calls it.

    Raises:
        ConfigError: there is none.
    """
    with torch.device("cpu"):  # whatever the device is that a model is built on now
        try:
            probe = _Probe(router, block)
        except Exception as error:
            reason = f"a copy of it was called with random tokens, with the result {error!r}"
            raise ConfigError(_refusal(router, reason)) from error
        found = next((way for way in _ways(router, block) if probe.accepts(way)), None)
    if found is None:
        raise ConfigError(_refusal(router, "it does not pick those with the highest scores out of all"))
    return found


def _refusal(router: Router, reason: str) -> str:
    return (
        f"a bias cannot take part in the choice of experts by {router.name!r} ({type(router.own).__name__}): {reason}"
        ". Leave router_bias out; a loss balances the experts of any family (router_aux_loss_coef)"
    )


def _ways(router: Router, block: nn.Module) -> Iterator[SelectionBias]:
    tensors = [*router.own.named_parameters(), *router.own.named_buffers()]
    yield from (OwnBias(name) for name, tensor in tensors if _is_of_experts(tensor, router))
    yield from (GivenBias(name) for name in _given(router, block))
    yield TopKBias()


def _given(router: Router, block: nn.Module) -> list[str]:
    """Tensors of the block, one number for each expert, after which an argument of the router is called."""
    arguments = inspect.signature(router.own.forward).parameters
    tensors = [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    return [name for name, tensor in tensors if name in arguments and _is_of_experts(tensor, router)]


def _is_of_experts(tensor: Tensor, router: Router) -> bool:
    return tensor.is_floating_point() and tensor.numel() == router.num_experts


class _Routing(NamedTuple):
    """Logits ``(T, E)``, chosen experts ``(T, K)`` and their weights ``(T, K)``."""

    logits: Tensor
    chosen: Tensor
    weights: Tensor

    def equals(self, other: _Routing) -> bool:
        return all(torch.equal(mine, theirs) for mine, theirs in zip(self, other, strict=True))


class _Probe:
    """A copy of a router, and what it makes of a few random tokens.

    Raises:
        Exception: the router cannot be called with tokens alone, or its choice is not in its output.
    """

    def __init__(self, router: Router, block: nn.Module) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._router = router
        self._copy = self._random_copy(router.own)
        self._given = {
            name: torch.rand(router.num_experts, generator=self._generator) for name in _given(router, block)
        }
        width = next(p.shape[-1] for p in router.own.parameters() if p.ndim == 2)
        self._tokens = torch.randn(_TOKENS, width, generator=self._generator)
        try:
            self._plain = self._run(None)
        except Exception:  # of any kind, from a router that takes sequences; any other fails again
            self._tokens = self._tokens[None]
            self._plain = self._run(None)
        self._check_repeatable()

    def accepts(self, way: SelectionBias) -> bool:
        """Whether a bias that is brought in this way does what it should."""
        nothing = torch.zeros(self._router.num_experts)
        expert = self._rarest()
        bias = _LARGE * torch.eye(self._router.num_experts)[expert]
        raised, lowered = self._run(way, bias), self._run(way, -bias)
        is_raised = raised.chosen == expert
        return (
            self._run(way, nothing).equals(self._plain)
            and torch.equal(raised.logits, self._plain.logits)
            and bool(is_raised.any(-1).all())
            and not bool((lowered.chosen == expert).any())
            # An expert of a group that was not chosen would have no weight.
            and bool((raised.weights[is_raised] > 0).all())
            # What the bias is beyond the choice does not matter.
            and self._run(way, 2 * bias).equals(raised)
            and not (isinstance(way, TopKBias) and self._has_masks())
        )

    def _check_repeatable(self) -> None:
        """With a bias it runs twice: what it remembers of its calls would be wrong, and its tokens changed twice."""
        before = [tensor.clone() for tensor in (self._tokens, *self._copy.state_dict().values())]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            self._copy.train().forward(self._tokens, **self._given)
        self._copy.eval()
        after = (self._tokens, *self._copy.state_dict().values())
        if not all(torch.equal(now, then) for now, then in zip(after, before, strict=True)):
            raise LayoutError("it changes its tokens, or itself, with every call")

    def _rarest(self) -> int:
        counts = torch.bincount(self._plain.chosen.flatten(), minlength=self._router.num_experts)
        if self._router.skip_class is not None:  # it stands for no expert, and never has a weight
            counts[self._router.skip_class] = counts.max() + 1
        return int(counts.argmin())

    def _has_masks(self) -> bool:
        """Whether experts were out of the question before the choice, which a bias could bring back."""
        mode = BiasedTopK(torch.zeros(self._router.num_experts))
        with torch.no_grad(), mode:
            self._copy.forward(self._tokens, **self._given)
        assert mode.scores is not None
        lowest = mode.scores.amin(-1, keepdim=True)
        return bool(((mode.scores == lowest).sum(-1) > 1).all())

    @torch.no_grad()
    def _run(self, way: SelectionBias | None, bias: Tensor | None = None) -> _Routing:
        if way is None or bias is None:
            output = self._copy.forward(self._tokens, **self._given)
        else:
            output = way.run(self._copy, bias, (self._tokens,), self._given)
        logits, choice = read_output(output, self._router)
        if choice is None or choice.top_k_weights is None:
            raise LayoutError("the chosen experts and their weights are not in its output")
        return _Routing(logits, choice.top_k_index, choice.top_k_weights)

    def _random_copy(self, module: nn.Module) -> nn.Module:
        """On the CPU, in float32, without the hooks of the original, which may hold the whole model."""
        memo: dict[int, Any] = {}
        for part in module.modules():
            memo |= {id(hooks): type(hooks)() for name, hooks in vars(part).items() if name.endswith("_hooks")}
        memo |= {id(tensor): self._random_like(tensor) for tensor in (*module.parameters(), *module.buffers())}
        twin = copy.deepcopy(module, memo)
        return twin.eval()

    def _random_like(self, tensor: Tensor) -> Tensor:
        """Matrices that keep the size of what they multiply, and vectors near one, which may be scales."""
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.ndim < 2:
            values = 0.5 + torch.rand(tensor.shape, generator=self._generator)
        else:
            values = torch.randn(tensor.shape, generator=self._generator) / tensor.shape[-1] ** 0.5
        return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
