"""R3: with the routes of the generator, the trainer computes what the generator computed."""

from __future__ import annotations

import functools

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from tests.families import randomise_factors
from tests.grpo.fakes import FakeBackend
from tests.grpo.test_trainer_gradient import log_probs_of
from tests.grpo.trainer_runs import draw, make_sample, make_trainer, packed, reference_model, step
from tests.router.replayed import forced_topk
from tests.tolerances import assert_gradient_close
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError, LayoutError
from trl_moe_ext.grpo.backends.protocol import Generation, GenerationRequest
from trl_moe_ext.grpo.batches import packing
from trl_moe_ext.grpo.sample import MoeRolloutSample
from trl_moe_ext.router.record import RoutingRecord
from trl_moe_ext.router.replay import RoutingReplay
from trl_moe_ext.router.routers import find_routers

ADAPTER = MoeLoraConfig(r=2, router_mode="full")
PROMPT, COMPLETIONS = [7, 30, 31, 32], [[50, 51, 52], [60, 61, 62, 63], [70, 71]]
EXPERTS, TOP_K = 8, 2


@functools.cache
def generator() -> nn.Module:
    model = get_peft_model(reference_model(torch.float32), ADAPTER)
    randomise_factors(model)
    return model


def other_routes(length: int, seed: int) -> RoutingRecord:
    """Experts drawn at random, which the routers would not have chosen; the last token has none."""
    rng = torch.Generator().manual_seed(seed)
    labels = [router.label for router in find_routers(generator())]
    chosen = {label: torch.rand(length, EXPERTS, generator=rng).argsort(1)[:, :TOP_K] for label in labels}
    for index in chosen.values():
        index[-1] = -1
    return RoutingRecord.of(chosen, dict.fromkeys(labels, EXPERTS))


def drawn(completion: list[int], routes: RoutingRecord, group_id: int = 0) -> MoeRolloutSample:
    """A sample whose log-probabilities the generator had by these routes, told by the family's own code."""
    sample = make_sample(PROMPT, completion, [0.0] * len(completion))
    # The last token, which is predicted and not run on, may go anywhere.
    everywhere = {label: index.clone() for label, index in routes.experts.items()}
    for index in everywhere.values():
        index[-1] = torch.arange(TOP_K)
    with torch.no_grad(), forced_topk(generator(), RoutingRecord.of(everywhere, routes.num_experts)):
        log_probs = log_probs_of(generator(), sample)
    return make_sample(PROMPT, completion, log_probs.tolist(), 1.0, group_id, routes)


def one_routing() -> list[MoeRolloutSample]:
    """Three samples of a group, whose shared tokens, the prompt but for its last, have shared routes."""
    longest = other_routes(len(PROMPT) + 4, seed=1)
    found = []
    for at, completion in enumerate(COMPLETIONS):
        own = other_routes(len(PROMPT) + len(completion), seed=2 + at)
        shared = len(PROMPT) - 1
        prompt = {label: index[:shared] for label, index in longest.experts.items()}
        routes = {label: torch.cat([prompt[label], index[shared:]]) for label, index in own.experts.items()}
        found.append(drawn(completion, RoutingRecord.of(routes, own.num_experts)))
    return found


def make(tmp_path, **options):
    trainer = make_trainer(tmp_path, peft_config=ADAPTER, **options)
    set_peft_model_state_dict(trainer.model, get_peft_model_state_dict(generator()))
    return trainer


def ratios(trainer) -> tuple[float, float]:
    found = trainer._meter.take()
    return found["kl"], found["importance/ratio_max"]


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_log_probabilities_are_those_of_the_generator(gradient_checkpointing, tmp_path):
    trainer = make(tmp_path, routing_replay=True, gradient_checkpointing=gradient_checkpointing)
    if gradient_checkpointing:
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    _, gradients = step(trainer, one_routing())
    kl, largest = ratios(trainer)
    assert kl < 1e-9
    assert largest == pytest.approx(1.0, abs=1e-4)
    routers = [gradient for name, gradient in gradients.items() if ".mlp.gate." in name]
    assert len(routers) == 4
    assert all(gradient.abs().max() > 0 for gradient in routers), "the gradient reaches the trained routers"
    shares = trainer._step_replay.take_metrics()
    assert shares["router/replay_mismatch"] > 0.5


def test_without_replay_they_are_others_and_the_mismatch_is_measured(tmp_path):
    trainer = make(tmp_path)
    step(trainer, one_routing())
    kl, _ = ratios(trainer)
    assert kl > 1e-4
    assert trainer._step_replay.take_metrics()["router/replay_mismatch"] > 0.5


def test_the_gradient_is_that_of_the_family_told_where_to_send_each_token(tmp_path):
    sample = one_routing()[1]
    trainer = make(tmp_path, routing_replay=True)
    _, found = step(trainer, [sample])
    assert sample.routes is not None
    everywhere = {label: index.clone() for label, index in sample.routes.experts.items()}
    for index in everywhere.values():
        index[-1] = torch.arange(TOP_K)
    generator().zero_grad()
    with forced_topk(generator(), RoutingRecord.of(everywhere, sample.routes.num_experts)):
        # On-policy, with an advantage of 1 in all of its tokens.
        (-log_probs_of(generator(), sample).mean()).backward()
    wanted = {name: p.grad for name, p in generator().named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_gradient_close(found[name], gradient, torch.float32, name)
    generator().zero_grad()


def test_a_shared_token_is_replayed_only_where_its_samples_agree(tmp_path):
    """Two samples share the prompt; their routes differ in its second token only."""
    trainer = make(tmp_path, routing_replay=True)
    samples = one_routing()[:2]
    assert samples[1].routes is not None
    changed = {label: index.clone() for label, index in samples[1].routes.experts.items()}
    for index in changed.values():
        index[1] = (index[1] + 1) % EXPERTS
    samples[1].routes = RoutingRecord.of(changed, samples[1].routes.num_experts)
    batch = packed(trainer, samples)
    routes = batch["routes"][0]
    shared = len(PROMPT) - 1
    assert (routes[1] == -1).all()
    assert (routes[[0, *range(2, shared)]] >= 0).all()
    assert trainer._metrics["train"]["router/replay_conflict_frac"] == [(1.0, float(len(routes)))]


def test_each_packed_token_has_the_routes_of_its_own_sample(tmp_path):
    """The prefix tree lays tokens out in an order of its own."""
    trainer = make(tmp_path, routing_replay=True)
    samples = one_routing()
    batch = packed(trainer, samples)
    tokens, routes = batch["input_ids"][0].tolist(), trainer._step_replay.slots.decode(batch["routes"][0])
    for sample in samples:
        # Unique tokens of each completion tell where it stands.
        for at, token in enumerate(sample.input_ids.tolist()[:-1]):
            if tokens.count(token) == 1:
                place = tokens.index(token)
                for label, index in sample.routes.experts.items():
                    assert routes.experts[label][place].tolist() == index[at].tolist()


def test_another_order_of_packing_is_noticed(monkeypatch, tmp_path):
    trainer = make(tmp_path, routing_replay=True)
    monkeypatch.setattr(packing, "packed_order", lambda row: [*range(len(row.tokens))][::-1])
    with pytest.raises(ImportError, match="another order"):
        packed(trainer, one_routing())


def test_a_backend_that_gives_no_routes_is_an_error(tmp_path):
    """One that was given as an object, of which no one can tell before."""
    trainer = make(tmp_path, routing_replay=True, max_steps=1)
    with pytest.raises(ConfigError, match="without any"):
        trainer.train()


def test_routes_of_the_wrong_length_are_an_error(tmp_path):
    trainer = make(tmp_path, routing_replay=True)
    sample = one_routing()[0]
    sample.routes = sample.routes.rows(slice(0, -1))
    with pytest.raises(ConfigError, match="7 tokens, but the backend gave routes of 6"):
        packed(trainer, [sample])


def test_a_model_that_cannot_be_replayed_is_refused_at_the_start(monkeypatch, tmp_path):
    """By the name of its router, before a generator is started."""

    def refuse(self: RoutingReplay, router: object, logits: Tensor, live: object) -> None:
        raise LayoutError(f"routes of {router.name!r} cannot be replayed")  # type: ignore[attr-defined]

    monkeypatch.setattr(RoutingReplay, "_rule", refuse)
    with pytest.raises(LayoutError, match=r"layers\.0\.mlp\.gate"):
        make_trainer(tmp_path, routing_replay=True)


def test_a_run_with_routes(tmp_path):
    """Through queue, packing and loop, with the routes that a backend gives."""

    def routed(request: GenerationRequest, asked: int, version: int) -> Generation:
        plain = draw(request, asked, version)
        length = len(request.prompt_ids) + len(plain.token_ids)
        return Generation(
            plain.id, plain.token_ids, plain.log_probs, plain.segments, other_routes(length, request.seed)
        )

    trainer = make_trainer(tmp_path, FakeBackend(complete=routed), routing_replay=True, max_steps=2)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["router/replay_mismatch"] > 0.5 for row in logs)
    assert all(0 < row["router/replay_conflict_frac"] < 1 for row in logs)
