"""The errors of gradients: those of rounding for every peer that computes the same, large for one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.bench.tiny import plan
from trl_moe_ext.bench import peers
from trl_moe_ext.bench.accuracy import gradient_errors
from trl_moe_ext.bench.build import build
from trl_moe_ext.bench.factors import factors_of
from trl_moe_ext.bench.peers import PEERS, PeerUnavailableError, peer_named
from trl_moe_ext.bench.tolerances import RELATIVE_ERROR
from trl_moe_ext.kernels.experts_mlp import experts_mlp
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts


@pytest.mark.parametrize("shape", ["tiny-qwen3", "tiny-gpt-oss"])
@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_is_as_exact_as_its_dtype(peer: str, shape: str) -> None:
    errors = gradient_errors(plan(peer=peer, source=shape))
    factors = {"dA", "dB"} if PEERS[peer].adapts_experts else set()
    assert errors.keys() == {"output", "dX", "dweights"} | factors
    assert max(errors.values()) <= RELATIVE_ERROR[torch.float32][0]
    # In bfloat16 they are rounding errors, and are not hidden.
    coarse = gradient_errors(plan(peer=peer, source=shape, dtype="bfloat16"))
    assert all(1e-4 < error <= RELATIVE_ERROR[torch.bfloat16][1] for error in coarse.values())


def test_a_wrong_kernel_has_large_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PEERS["moe_lora"]

    def wrong(*args, down_updates, **kwargs):
        return experts_mlp(
            *args, down_updates=tuple(u._replace(scaling=2 * u.scaling) for u in down_updates), **kwargs
        )

    def attach(subject, rank):
        model = right.attach(subject, rank)
        for layer in model.modules():
            if isinstance(layer, MoeLoraExperts):
                layer.kernels["default"] = wrong
        return model

    monkeypatch.setitem(peers.PEERS, "moe_lora", replace(right, attach=attach))
    assert min(gradient_errors(plan()).values()) > 1e-2


def test_both_hosts_get_the_same_factors() -> None:
    seen = []
    for peer in ("moe_lora", "peft_grouped_mm"):
        subject = build(plan(peer=peer), "grouped_mm")
        factors = factors_of(peer_named(peer).attach(subject, 4), subject.layout)
        for projection in factors.values():
            projection.randomise(torch.Generator().manual_seed(3))
        seen.append({name: (f.expert_a(f.A).clone(), f.expert_b(f.B).clone()) for name, f in factors.items()})
    ours, theirs = seen
    assert ours.keys() == theirs.keys() == {"gate_up_proj", "down_proj"}
    for name in ours:
        assert all(torch.equal(a, b) for a, b in zip(ours[name], theirs[name], strict=True))
    assert [tensor.shape for tensor in ours["down_proj"]] == [(6, 4, 48), (6, 64, 4)]


def test_a_block_has_no_reference() -> None:
    with pytest.raises(PeerUnavailableError, match="The reference has no form"):
        gradient_errors(plan(source="tiny-llama4"))
