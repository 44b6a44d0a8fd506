"""Random calls of a kernel: those of `trl_moe_ext.bench.cases`, and what only tests ask for."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trl_moe_ext.bench.call import Call
from trl_moe_ext.bench.cases import Case, make_call
from trl_moe_ext.bench.draw import Draw
from trl_moe_ext.kernels.gates import Gate
from trl_moe_ext.kernels.selected import SelectedExperts


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def interleaved(h: Tensor, limit: float = 4.0) -> Tensor:
    gate, up = h[..., ::2].clamp(max=limit), h[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.7 * gate)


def relu_squared(h: Tensor) -> Tensor:
    return F.relu(h).square()


# Each written out once more, so that a gate's own forward is tested as well.
CLOSED_FORMS = {
    swiglu: Gate("silu_glu"),
    relu_squared: Gate("relu_squared"),
    interleaved: Gate("clamped", 1.7, 4.0),
}


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
) -> Call:
    """E != r and no two sizes alike, so that a swapped axis cannot pass.

    `selected` are the `Chosen` of every projection, or of each by its name; None for updates of all experts.
    """
    case = Case(
        "of a test",
        hidden=H,
        intermediate=I,
        gate=CLOSED_FORMS[activation],
        is_transposed=transposed,
        has_bias=bias,
        has_gate_apart=gate_apart,
        weights_on_input=weights_on_input,
        adapters=adapters,
        dropout=dropout,
        chosen=E + (2 if sentinels else identity_experts),
        identity_experts=identity_experts,
        tokens=T,
        top_k=K,
        experts=E,
        rank=r,
    )
    call = make_call(case, dtype, torch.device("cpu"), seed)
    if activation is interleaved:
        activation = partial(interleaved, limit=call.weights.closed_form.limit)
    call.weights = call.weights._replace(activation=activation, post_norm=post_norm)
    if selected is not None:
        select(call, case, selected, Draw(seed + 1, dtype, torch.device("cpu")))
    return call


def select(call: Call, case: Case, selected, draw: Draw) -> None:
    """Put updates of the chosen experts in the places of those of all; updates of one adapter share its seed."""
    sizes = {"up": (case.hidden, case.up_features), "down": (case.intermediate, case.hidden)}
    if case.has_gate_apart:
        sizes["gate"] = case.hidden, case.intermediate

    def update(n_in, n_out, number, chosen):
        count = case.experts if chosen.experts is None else len(chosen.experts)
        drawn = draw.update(count, chosen.r, n_in, n_out, number, case.dropout)
        seed = draw.seed(chosen.adapter) if case.dropout else None
        some = None if chosen.experts is None else SelectedExperts(chosen.experts, case.experts)
        return drawn._replace(seed=seed, selected=some)

    for name, (n_in, n_out) in sizes.items():
        chosen = selected[name] if isinstance(selected, dict) else selected
        if chosen is not None:
            setattr(call, name, tuple(update(n_in, n_out, number, each) for number, each in enumerate(chosen)))
