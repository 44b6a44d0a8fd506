"""Small random calls of a kernel: everything that routed experts in the field have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.kernels.gates import Gate
from trl_moe_ext.kernels.low_rank import LowRank, Updates

_TOKENS, _TOP_K, _EXPERTS, _RANK = 40, 2, 6, 3
_SILU, _RELU_SQUARED = Gate("silu_glu"), Gate("relu_squared")


@dataclass(frozen=True)
class Case:
    """What is special about a call; everything else is a gated SiLU with one adapter on both projections.

    Attributes:
        hidden, intermediate: sizes; both give strides that a GPU's grouped product takes, unless said otherwise.
        gate: the activation; `limit` is that of the clamped one in float32.
        chosen: how many experts tokens are sent to: fewer than there are leaves some idle, more are experts of
            another rank.
    """

    name: str
    hidden: int = 64
    intermediate: int = 48
    gate: Gate = _SILU
    is_transposed: bool = False
    has_bias: bool = False
    has_gate_apart: bool = False
    weights_on_input: bool = False
    adapters: int = 1
    dropout: float = 0.0
    chosen: int = _EXPERTS
    identity_experts: int = 0


CASES = (
    Case("gated"),
    Case("transposed", is_transposed=True),
    Case("biased", has_bias=True),
    Case("clamped", gate=Gate("clamped", 1.7, 4.0), is_transposed=True, has_bias=True),
    Case("ungated", gate=_RELU_SQUARED),
    Case("gate of its own", has_gate_apart=True),
    Case("weights on the input", weights_on_input=True, is_transposed=True),
    Case("dropout", dropout=0.25),
    Case("no adapter", adapters=0),
    Case("two adapters", adapters=2),
    Case("idle experts", chosen=2),
    Case("experts of another rank", chosen=_EXPERTS + 3),
    Case("identity experts", chosen=_EXPERTS + 2, identity_experts=2),
    Case("odd sizes", hidden=20, intermediate=13),
)


@dataclass
class Call:
    """The arguments of a kernel, and a gradient of its output."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    weights: ExpertsWeights
    updates: dict[str, Updates]
    grad: Tensor

    def run(self, kernel: Callable[..., Tensor]) -> dict[str, Tensor | None]:
        """The output and every gradient; None for one that is missing."""
        leaves = {"tokens": _leaf(self.hidden_states), "routing weights": _leaf(self.top_k_weights)}
        updates = {role: tuple(_leaves(update) for update in given) for role, given in self.updates.items()}
        for role, given in updates.items():
            for number, update in enumerate(given):
                leaves |= {f"{role}[{number}].A": update.A, f"{role}[{number}].B": update.B}
        arguments = {f"{role}_updates": given for role, given in updates.items()}
        out = kernel(leaves["tokens"], self.top_k_index, leaves["routing weights"], self.weights, **arguments)
        gradients = torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype), allow_unused=True)
        return {"output": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    def double(self) -> Call:
        """The same numbers in float64."""
        return Call(**{name: _double(value) for name, value in vars(self).items()})


def make_call(case: Case, dtype: torch.dtype, device: torch.device) -> Call:
    """Random arguments, the same at each call. No two sizes are alike, so that a swapped axis is noticed."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cpu") * scale).to(device, dtype)

    def stack(n_in: int, n_out: int) -> Tensor:
        shape = (n_in, n_out) if case.is_transposed else (n_out, n_in)
        weight = randn(_EXPERTS, *shape, scale=n_in**-0.5)
        return weight if case.is_transposed else weight.transpose(1, 2)

    def updates(n_in: int, n_out: int) -> Updates:
        return tuple(
            LowRank(
                randn(_EXPERTS, _RANK + number, n_in, scale=n_in**-0.5),
                randn(_EXPERTS, n_out, _RANK + number),
                0.7 + number,
                case.dropout,
                torch.tensor(1234 + number, dtype=torch.int32, device=device) if case.dropout else None,
            )
            for number in range(case.adapters)
        )

    H, I = case.hidden, case.intermediate
    up = 2 * I if case.gate.name != "relu_squared" and not case.has_gate_apart else I
    gate = _in_reach(case.gate, dtype)
    scores = torch.rand(_TOKENS, case.chosen, generator=generator, device="cpu")
    weights = ExpertsWeights(
        up=stack(H, up),
        down=stack(I, H),
        up_bias=randn(_EXPERTS, up) if case.has_bias else None,
        down_bias=randn(_EXPERTS, H) if case.has_bias else None,
        activation=gate.forward,
        post_norm=None,
        gate=stack(H, I) if case.has_gate_apart else None,
        weights_on_input=case.weights_on_input,
        identity_experts=case.identity_experts,
        closed_form=gate,
    )
    return Call(
        hidden_states=randn(_TOKENS, H),
        top_k_index=scores.topk(_TOP_K, dim=-1).indices.to(device),
        top_k_weights=randn(_TOKENS, _TOP_K).float().softmax(dim=-1).to(dtype),
        weights=weights,
        updates={
            "up": updates(H, up),
            "down": updates(I, H),
            **({"gate": updates(H, I)} if case.has_gate_apart else {}),
        },
        grad=randn(_TOKENS, H),
    )


def _in_reach(gate: Gate, dtype: torch.dtype) -> Gate:
    """In bfloat16 rounding carries values across a bound, where the gradient jumps: there it is out of reach."""
    return gate._replace(limit=100.0) if gate.name == "clamped" and dtype == torch.bfloat16 else gate


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _leaves(update: LowRank) -> LowRank:
    return update._replace(A=_leaf(update.A), B=_leaf(update.B))


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _double(item) for name, item in value.items()}
    if isinstance(value, tuple):
        items = [_double(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
