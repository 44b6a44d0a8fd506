"""Every peer adapts what it says, and runs in a step of each kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.bench.tiny import TINY, plan
from trl_moe_ext.bench.build import build
from trl_moe_ext.bench.measure import measure
from trl_moe_ext.bench.peers import DEFAULT_PEERS, PEERS, PeerUnavailableError, peer_named
from trl_moe_ext.bench.plan import Plan
from trl_moe_ext.errors import ConfigError, PluginError
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts

PEFT_NEEDS_A_CHOICE = ("tiny-llama4", "peft_grouped_mm")


def adapted(plan: Plan) -> tuple[nn.Module, torch.Tensor]:
    """The model of a plan after one step, and what the forward made."""
    peer = peer_named(plan.peer)
    subject = build(plan, peer.implementation)
    model = peer.attach(subject, plan.rank)
    torch.manual_seed(1)
    return model, subject.step(model, *subject.draw(plan.tokens))


def with_gradient(model: nn.Module) -> set[str]:
    """Last names of the modules around each parameter that got a gradient."""
    return {name for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["experts", "layer"])
@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("peer", [*PEERS, "moe_lora:grouped"])
def test_a_peer_is_measured(kind: str, shape: str, peer: str) -> None:
    job = plan(kind=kind, source=shape, peer=peer)
    if (shape, peer) == PEFT_NEEDS_A_CHOICE:
        with pytest.raises(PeerUnavailableError, match=r"experts interface \(llama4\) have one implementation"):
            measure(job)
        return
    measured = measure(job)
    assert len(measured.seconds) == 1
    assert measured.median > 0
    assert measured.extra_bytes is None or measured.extra_bytes >= 0  # tiny steps may fit in what is there


@pytest.mark.parametrize("peer", PEERS.keys() - {"moe_esft_quarter"})
def test_only_what_the_peer_names_is_trained(peer: str) -> None:
    model, _ = adapted(plan(kind="layer", peer=peer))
    trained = with_gradient(model)
    attention = {name for name in trained if "q_proj" in name or "v_proj" in name}
    assert len(attention) == 4  # A and B of both
    assert all("lora_" in name for name in trained)
    # A and B of both projections, in one module of ours or in two of PEFT's.
    assert len(trained - attention) == (4 if peer_named(peer).adapts_experts else 0)


def test_a_quarter_of_the_experts_in_full() -> None:
    model, _ = adapted(plan(kind="layer", peer="moe_esft_quarter"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stacks = [p for name, p in model.named_parameters() if p.ndim == 3 and not p.requires_grad]
    assert len(trained) == len(stacks) == 2
    # Of six experts every fourth is two.
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in stacks) / 3


def test_frozen_experts_alone_have_nothing_to_train() -> None:
    model, _ = adapted(plan(peer="frozen"))
    assert not any(p.requires_grad for p in model.parameters())


def test_all_peers_compute_the_same_at_the_start() -> None:
    outputs = {peer: adapted(plan(peer=peer))[1] for peer in PEERS}
    for out in outputs.values():
        torch.testing.assert_close(out, outputs["frozen"])


def test_off_runs_our_kernel_without_factors() -> None:
    job = plan(peer="moe_lora_off")
    subject = build(job, "grouped_mm")
    model = peer_named(job.peer).attach(subject, job.rank)
    [layer] = [module for module in model.modules() if isinstance(module, MoeLoraExperts)]
    calls = []
    kernel = layer.kernels["default"]
    layer.kernels["default"] = lambda *args, **kwargs: calls.append(kwargs) or kernel(*args, **kwargs)
    subject.step(model, *subject.draw(job.tokens))
    assert [call[name] for call in calls for name in ("up_updates", "down_updates")] == [(), ()]


def test_options_reach_the_adapter() -> None:
    for peer, saved in (("moe_lora", "gate_up"), ("moe_lora_none", "none")):
        model, _ = adapted(plan(peer=peer, rank=3))
        config = model.peft_config["default"]
        assert (config.r, config.save_activations) == (3, saved)
    model, _ = adapted(plan(peer="moe_lora:fused"))
    assert model.peft_config["default"].kernel == "fused"


def test_all_attention_where_a_family_has_no_v_proj(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_moe_ext.bench import peers

    subject = build(plan(kind="layer"), "grouped_mm")
    assert [name.rpartition(".")[2] for name in peers._attention(subject)] == ["q_proj", "v_proj"]
    layer = subject.model.get_submodule("model.layers.0.self_attn")
    layer.kv_proj = layer.v_proj
    del layer.v_proj
    found = [name.rpartition(".")[2] for name in peers._attention(subject)]
    assert sorted(found) == ["k_proj", "kv_proj", "o_proj", "q_proj"]


def test_what_stock_peft_refuses_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("not these")

    monkeypatch.setattr("trl_moe_ext.bench.peers.get_peft_model", refuse)
    with pytest.raises(PeerUnavailableError, match="Stock PEFT refuses: NotImplementedError: not these"):
        measure(plan(peer="peft_grouped_mm"))


def test_numbers_that_are_not_finite_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl_moe_ext.bench.subjects import ExpertsAlone
    from trl_moe_ext.errors import MoeExtError

    step = ExpertsAlone.step
    monkeypatch.setattr(ExpertsAlone, "step", lambda *args: step(*args) * float("nan"))
    with pytest.raises(MoeExtError, match="step 0 of moe_lora gives numbers that are not finite"):
        measure(plan())


def test_unknown_words() -> None:
    with pytest.raises(ConfigError, match=r"there is no peer 'moe_lora_non'; did you mean moe_lora_none"):
        peer_named("moe_lora_non")
    with pytest.raises(PluginError, match=r"register_kernels has no 'gruoped'; did you mean grouped\?"):
        peer_named("moe_lora:gruoped")


def test_the_defaults_leave_out_what_takes_minutes() -> None:
    assert [peer for peer in PEERS if peer not in DEFAULT_PEERS] == [
        "moe_lora_quarter",
        "moe_esft_quarter",
        "peft_eager",
    ]
