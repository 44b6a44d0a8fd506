"""Small random calls of a kernel: everything that routed experts in the field have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trl_moe_ext.bench.call import Call
from trl_moe_ext.bench.draw import Draw
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.kernels.gates import Gate
from trl_moe_ext.kernels.low_rank import Updates

_EXPERTS = 6
_SILU, _RELU_SQUARED = Gate("silu_glu"), Gate("relu_squared")


@dataclass(frozen=True)
class Case:
    """What is special about a call; everything else is a gated SiLU with one adapter on both projections.

    Attributes:
        hidden, intermediate: sizes; both give strides that a GPU's grouped product takes, unless said otherwise.
        gate: the activation; `limit` is that of the clamped one in float32.
        chosen: how many experts tokens are sent to: fewer than there are leaves some idle, more are experts of
            another rank.
        rank: of the first adapter's factors; every other one has one more than the one before.
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
    tokens: int = 40
    top_k: int = 2
    experts: int = _EXPERTS
    rank: int = 3

    @property
    def up_features(self) -> int:
        """What the first projection gives: gate and up, or one of them."""
        is_single = self.gate.name == "relu_squared" or self.has_gate_apart
        return self.intermediate if is_single else 2 * self.intermediate


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


def make_call(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Call:
    """Random arguments, the same for the same seed. No two sizes are alike, so that a swapped axis is noticed."""
    draw, H, I = Draw(seed, dtype, device), case.hidden, case.intermediate
    index = draw.routing(case.tokens, case.chosen, case.top_k)
    weights = _weights(case, draw, _in_reach(case.gate, dtype))

    def updates(n_in: int, n_out: int) -> Updates:
        ranks = enumerate(range(case.rank, case.rank + case.adapters))
        return tuple(draw.update(case.experts, r, n_in, n_out, number, case.dropout) for number, r in ranks)

    return Call(
        hidden_states=draw.normal(case.tokens, H),
        top_k_index=index,
        top_k_weights=draw.normal(case.tokens, case.top_k).float().softmax(dim=-1).to(dtype),
        weights=weights,
        up=updates(H, case.up_features),
        down=updates(I, H),
        gate=updates(H, I) if case.has_gate_apart else (),
        grad=draw.normal(case.tokens, H),
    )


def _weights(case: Case, draw: Draw, gate: Gate) -> ExpertsWeights:
    E, H, I, up = case.experts, case.hidden, case.intermediate, case.up_features
    return ExpertsWeights(
        up=draw.stack(E, H, up, case.is_transposed),
        down=draw.stack(E, I, H, case.is_transposed),
        up_bias=draw.normal(E, up) if case.has_bias else None,
        down_bias=draw.normal(E, H) if case.has_bias else None,
        activation=gate.forward,
        post_norm=None,
        gate=draw.stack(E, H, I, case.is_transposed) if case.has_gate_apart else None,
        weights_on_input=case.weights_on_input,
        identity_experts=case.identity_experts,
        closed_form=gate,
    )


def _in_reach(gate: Gate, dtype: torch.dtype) -> Gate:
    """In bfloat16 rounding carries values across a bound, where the gradient jumps: there it is out of reach."""
    return gate._replace(limit=100.0) if gate.name == "clamped" and dtype == torch.bfloat16 else gate
