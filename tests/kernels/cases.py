"""Random routed experts of every shape that the kernels must take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.kernels.gates import Gate
from trl_moe_ext.kernels.lora_linear import LowRank


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
        def changed(value):
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, tuple):
                items = [changed(item) for item in value]
                return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
            return value

        return Case(*(changed(getattr(self, name)) for name in self.__dataclass_fields__))


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
    seed=0,
) -> Case:
    """E != r and no two sizes alike, so that a swapped axis cannot pass."""
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

    def updates(n_in, n_out):
        return tuple(
            LowRank(
                randn(E, r + i, n_in, scale=n_in**-0.5),
                randn(E, n_out, r + i),
                0.7 + i,
                dropout,
                torch.tensor(1234 + i, dtype=torch.int32) if dropout else None,
            )
            for i in range(adapters)
        )

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
        updates(H, up_features),
        updates(I, H),
        randn(T, H),
        updates(H, I) if gate_apart else (),
    )
