"""Random routed experts of every shape that the kernels must take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.kernels.gates import Gate
from trl_moe_ext.kernels.low_rank import LowRank
from trl_moe_ext.kernels.selected import SelectedExperts


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved(h: Tensor, limit: float = 4.0) -> Tensor:
    gate, up = h[..., ::2].clamp(max=limit), h[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def relu_squared(h: Tensor) -> Tensor:
    return F.relu(h).square()


@dataclass
class Case:
    """Inputs of one call of `experts_mlp`; `leaves` are those whose gradients are compared."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    weights: ExpertsWeights
    up: tuple[LowRank, ...]
    down: tuple[LowRank, ...]
    grad: Tensor
    gate: tuple[LowRank, ...] = ()

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"hidden_states": self.hidden_states, "top_k_weights": self.top_k_weights}
        for projection, updates in (("up", self.up), ("down", self.down), ("gate", self.gate)):
            for number, update in enumerate(updates):
                named[f"{projection}[{number}].A"] = update.A
                named[f"{projection}[{number}].B"] = update.B
        return named

    def run(self, kernel) -> tuple[Tensor, dict[str, Tensor]]:
        """Output and every gradient."""
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in self.leaves.items()}

        def rebuilt(projection: str, updates: tuple[LowRank, ...]) -> tuple[LowRank, ...]:
            return tuple(
                u._replace(A=leaves[f"{projection}[{n}].A"], B=leaves[f"{projection}[{n}].B"])
                for n, u in enumerate(updates)
            )

        out = kernel(
            leaves["hidden_states"],
            self.top_k_index,
            leaves["top_k_weights"],
            self.weights,
            rebuilt("up", self.up),
            rebuilt("down", self.down),
            **({"gate_updates": rebuilt("gate", self.gate)} if self.gate else {}),
        )
        gradients = torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype))
        return out, dict(zip(leaves, gradients, strict=True))

    def double(self) -> Case:
        """The same numbers in float64."""
        return self._with(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def to(self, device: str) -> Case:
        """The same on another device."""
        return self._with(lambda tensor: tensor.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Case:
        # What was one tensor stays one: updates share the seed of their adapter.
        known: dict[int, Tensor] = {}

        def changed(value):
            if isinstance(value, Tensor):
                if id(value) not in known:
                    known[id(value)] = change(value)
                return known[id(value)]
            if isinstance(value, tuple):
                items = [changed(item) for item in value]
                return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
            return value

        return Case(*(changed(getattr(self, name)) for name in self.__dataclass_fields__))


class Chosen(NamedTuple):
    """An update of some experts only; those of one adapter drop the same inputs."""

    experts: tuple[int, ...] | None
    r: int = 3
    adapter: int = 0


def make_case(
    *,
    T=23,
    K=2,
    E=5,
    H=16,
    I=12,
    r=3,
    dtype=torch.float32,
    activation=swiglu,
    transposed=False,
    bias=False,
    post_norm=None,
    adapters=1,
    dropout=0.0,
    sentinels=False,
    gate_apart=False,
    weights_on_input=False,
    identity_experts=0,
    selected=None,
    seed=0,
) -> Case:
    """E != r and no two sizes alike, so that a swapped axis cannot pass.

    `selected` are the `Chosen` of every projection, or of each by its name; None for updates of all experts.
    """
    g = torch.Generator().manual_seed(seed)
    if activation is interleaved and dtype == torch.bfloat16:
        # Rounding carries values across the bound, where the gradient jumps: the bound is tested in wider dtypes.
        activation = partial(interleaved, limit=100.0)

    closed_form = {
        swiglu: Gate("silu_glu"),
        relu_squared: Gate("relu_squared"),
        interleaved: Gate("clamped", 1.7, 4.0),
    }.get(activation, Gate("clamped", 1.7, 100.0))

    def randn(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    up_features = I if activation is relu_squared or gate_apart else 2 * I
    up = randn(E, H, up_features, scale=H**-0.5) if transposed else randn(E, up_features, H, scale=H**-0.5).mT
    down = randn(E, I, H, scale=I**-0.5) if transposed else randn(E, H, I, scale=I**-0.5).mT

    seeds = [torch.tensor(1234 + i, dtype=torch.int32) if dropout else None for i in range(4)]

    def update(n_in, n_out, number, chosen):
        experts = E if chosen.experts is None else len(chosen.experts)
        return LowRank(
            randn(experts, chosen.r, n_in, scale=n_in**-0.5),
            randn(experts, n_out, chosen.r),
            0.7 + number,
            dropout,
            seeds[chosen.adapter],
            selected=None if chosen.experts is None else SelectedExperts(chosen.experts, E),
        )

    def updates(name, n_in, n_out):
        chosen = selected[name] if isinstance(selected, dict) else selected
        if chosen is None:
            chosen = [Chosen(None, r + i, i) for i in range(adapters)]
        return tuple(update(n_in, n_out, number, each) for number, each in enumerate(chosen))

    index = torch.rand(T, E + (2 if sentinels else identity_experts), generator=g).topk(K, dim=-1).indices
    return Case(
        randn(T, H),
        index,
        torch.softmax(torch.randn(T, K, generator=g), -1).to(dtype),
        ExpertsWeights(
            up,
            down,
            randn(E, up_features) if bias else None,
            randn(E, H) if bias else None,
            activation,
            post_norm,
            randn(E, I, H, scale=H**-0.5).mT if gate_apart else None,
            weights_on_input,
            identity_experts,
            closed_form,
        ),
        updates("up", H, up_features),
        updates("down", I, H),
        randn(T, H),
        updates("gate", H, I) if gate_apart else (),
    )
