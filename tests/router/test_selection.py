"""A bias that takes part in the choice of experts and in nothing else, on routers whose every line can be seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.families import FAMILIES, build
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.places import read_places
from trl_moe_ext.router.routers import Router, find_routers
from trl_moe_ext.router.selection import BiasedTopK, GivenBias, OwnBias, TopKBias
from trl_moe_ext.router.selection_probe import find_selection_bias

T, E, K, H = 40, 8, 2, 16


class TopKRouter(nn.Module):
    """Softmax over all experts, weights of the chosen normalised to one: the plain case that the others vary."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = K
        self.weight = nn.Parameter(torch.randn(E, H))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden_states @ self.weight.T
        scores = logits.softmax(-1)
        weights, index = self.choose(scores)
        return logits, weights / weights.sum(-1, keepdim=True), index

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(scores.topk(self.top_k, dim=-1))


class OwnRouter(TopKRouter):
    def __init__(self) -> None:
        super().__init__()
        self.correction = nn.Buffer(torch.rand(E) / 10)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.topk(scores + self.correction, self.top_k).indices
        return scores.gather(1, index), index


class GivenRouter(TopKRouter):
    def forward(self, hidden_states: Tensor, expert_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden_states @ self.weight.T
        index = torch.topk(logits + expert_bias, self.top_k).indices
        return logits, logits.sigmoid().gather(1, index), index


class SequenceRouter(TopKRouter):
    """Takes sequences only."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, _, width = hidden_states.shape
        return super().forward(hidden_states.reshape(-1, width))


class ScaledRouter(TopKRouter):
    """A scale of each expert, of the same shape as a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.per_expert_scale = nn.Parameter(torch.rand(E) + 0.5)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, index = super().forward(hidden_states)
        return logits, weights * self.per_expert_scale[index], index


class GroupRouter(TopKRouter):
    """Chooses inside the better half of the experts."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        best = scores.view(-1, 2, E // 2).amax(-1).argmax(-1, keepdim=True)
        mask = torch.arange(E) // (E // 2) == best
        return tuple(scores.masked_fill(~mask, 0.0).topk(self.top_k, dim=-1))


class UnmaskedGroupRouter(GroupRouter):
    """The same with weights of the scores before they were masked."""

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        index = super().choose(scores)[1]
        return scores.gather(1, index), index


class SortRouter(TopKRouter):
    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        index = scores.argsort(-1, descending=True)[:, : self.top_k]
        return scores.gather(1, index), index


class LogitsRouter(TopKRouter):
    """Leaves the choice to its block."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.weight.T


class GreedyRouter(TopKRouter):
    """Changes the tokens that it is given."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(hidden_states.mul_(1.1))


class CountingRouter(TopKRouter):
    """Remembers how often it was called in training."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Buffer(torch.zeros(()))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.calls += self.training
        return super().forward(hidden_states)


def block_of(gate: nn.Module) -> nn.Module:
    block = nn.Module()
    block.gate = gate
    if isinstance(gate, GivenRouter):
        block.expert_bias = nn.Parameter(torch.rand(E), requires_grad=False)
    return block


def router_of(gate: nn.Module) -> Router:
    return Router(name="mlp.gate", module=gate, num_experts=E, top_k=K, experts="mlp.experts", label="0")


WORKS = [
    (TopKRouter, TopKBias()),
    (OwnRouter, OwnBias("correction")),
    (GivenRouter, GivenBias("expert_bias")),
    (SequenceRouter, TopKBias()),
    (ScaledRouter, TopKBias()),
]


@pytest.mark.parametrize(("kind", "way"), WORKS, ids=[kind.__name__ for kind, _ in WORKS])
def test_the_way_is_found_by_what_a_router_does(kind, way):
    gate = kind()
    before = {name: tensor.clone() for name, tensor in gate.state_dict().items()}
    assert find_selection_bias(router_of(gate), block_of(gate)) == way
    assert all(torch.equal(tensor, before[name]) for name, tensor in gate.state_dict().items())


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_router_needs_no_weights_and_may_be_in_any_dtype(device):
    gate = OwnRouter().to(device, torch.bfloat16)
    with torch.device(device):
        assert find_selection_bias(router_of(gate), block_of(gate)) == OwnBias("correction")


def test_hooks_of_the_router_stay_out_of_the_experiment():
    gate, calls = TopKRouter(), []
    gate.register_forward_hook(lambda *_: calls.append("called"))
    gate.register_forward_pre_hook(pytest.fail)
    find_selection_bias(router_of(gate), block_of(gate))
    assert calls == []


REFUSED = [
    (GroupRouter, "does not pick those with the highest scores out of all"),
    (UnmaskedGroupRouter, "does not pick those with the highest scores out of all"),
    (SortRouter, "does not pick those with the highest scores out of all"),
    (LogitsRouter, "the chosen experts and their weights are not in its output"),
    (GreedyRouter, "it changes its tokens, or itself"),
    (CountingRouter, "it changes its tokens, or itself"),
]


@pytest.mark.parametrize(("kind", "reason"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_a_router_that_takes_no_bias_is_named_with_what_to_do(kind, reason):
    gate = kind()
    with pytest.raises(ConfigError, match=rf"'mlp.gate' \({kind.__name__}\): .*{reason}.*router_aux_loss_coef"):
        find_selection_bias(router_of(gate), block_of(gate))


@pytest.mark.parametrize("kind", [TopKRouter, OwnRouter, GivenRouter, ScaledRouter])
def test_only_the_choice_changes(kind):
    """The reference ranks by what the family ranks by plus the bias, and takes weights from the plain scores."""
    gate = kind()
    block = block_of(gate)
    bias, tokens = torch.linspace(-0.3, 0.3, E), torch.randn(T, H)
    given = {"expert_bias": block.expert_bias} if kind is GivenRouter else {}
    way = find_selection_bias(router_of(gate), block)
    found_logits, found_weights, found_index = way.run(gate, bias, (tokens,), given)
    logits = tokens.double() @ gate.weight.double().T
    scores = logits.sigmoid() if kind is GivenRouter else logits.softmax(-1)
    own = {OwnRouter: lambda: gate.correction, GivenRouter: lambda: block.expert_bias}.get(kind, lambda: 0.0)()
    index = ((logits if kind is GivenRouter else scores) + own + bias).argsort(-1, descending=True)[:, :K]
    weights = scores.gather(1, index)
    weights = weights if kind is GivenRouter else weights / weights.sum(-1, keepdim=True)
    weights = weights * gate.per_expert_scale[index] if kind is ScaledRouter else weights
    assert torch.equal(found_index, index)
    torch.testing.assert_close(found_weights.double(), weights.double(), rtol=1e-5, atol=0)
    assert torch.equal(found_logits, gate(tokens, **given)[0])
    assert not torch.equal(found_index, gate(tokens, **given)[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [TopKRouter, OwnRouter, GivenRouter])
def test_a_bias_of_zero_changes_no_bit(kind, dtype):
    gate = kind().to(dtype)
    block = block_of(gate).to(dtype)
    given = {"expert_bias": block.expert_bias} if kind is GivenRouter else {}
    way = find_selection_bias(router_of(gate), block)
    tokens = torch.randn(T, H, dtype=dtype)
    for found, plain in zip(way.run(gate, torch.zeros(E), (tokens,), given), gate(tokens, **given), strict=True):
        assert found.dtype == plain.dtype
        assert torch.equal(found, plain)


@pytest.mark.parametrize("kind", [TopKRouter, OwnRouter])
def test_gradients_are_those_of_the_weights_that_were_chosen(kind):
    gate = kind().double()
    tokens, bias = torch.randn(T, H, dtype=torch.float64), torch.linspace(-0.3, 0.3, E, dtype=torch.float64)
    way = find_selection_bias(router_of(gate), block_of(gate))
    _, weights, index = way.run(gate, bias, (tokens,), {})
    direction = torch.randn_like(weights)
    (found,) = torch.autograd.grad(weights, gate.weight, direction)
    scores = (tokens @ gate.weight.T).softmax(-1).gather(1, index)
    (expected,) = torch.autograd.grad(scores / scores.sum(-1, keepdim=True), gate.weight, direction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [OwnRouter, TopKRouter])
def test_an_error_leaves_the_router_as_it_was(kind):
    gate = kind()
    before = gate.state_dict(keep_vars=True)
    way = find_selection_bias(router_of(gate), block_of(gate))
    with pytest.raises(RuntimeError):
        way.run(gate, torch.ones(E), (torch.randn(T, H + 1),), {})
    assert all(tensor is before[name] for name, tensor in gate.state_dict(keep_vars=True).items())
    scores = torch.randn(T, E)
    assert torch.equal(scores.topk(K).indices, scores.argsort(-1, descending=True)[:, :K])


def test_other_choices_inside_a_router_are_left_alone():
    bias = torch.tensor([9.0, 0.0, 0.0])
    scores = torch.tensor([[1.0, 2.0, 3.0]])
    with BiasedTopK(bias):
        assert scores.topk(1).indices.tolist() == [[0]]
        assert scores.topk(1, largest=False).indices.tolist() == [[0]]  # the lowest score, not the highest bias
        assert scores.T.topk(1, dim=0).indices.tolist() == [[2]]  # over tokens
        assert scores[:, :2].topk(1).indices.tolist() == [[1]]  # over groups
    assert scores.topk(1).indices.tolist() == [[2]]


def _leaky_topk(self, input, k, dim=-1, largest=True, sorted=True):
    return torch.topk(input + self._bias, k, dim, largest, sorted)


def _deaf_topk(self, input, k, dim=-1, largest=True, sorted=True):
    self.scores = input
    return torch.topk(input, k, dim, largest, sorted)


@pytest.mark.parametrize("wrong", [_leaky_topk, _deaf_topk])
def test_the_experiment_can_fail(monkeypatch, wrong):
    """A bias that gets into the weights, and one that changes nothing."""
    monkeypatch.setattr(BiasedTopK, "_topk", wrong)
    gate = TopKRouter()
    with pytest.raises(ConfigError, match="does not pick"):
        find_selection_bias(router_of(gate), block_of(gate))


# Families whose routers take no bias, and why.
NONE = {
    "dbrx": "are not in its output",
    "doge": "are not in its output",
    "nllb-moe": "does not pick",
    "phimoe": "does not pick",
    "switch_transformers": "does not pick",
}
GIVEN = {"afmoe", "dots3_note_vision_encoder", "hy_v3", "lfm2_moe", "minimax_m2"}


@pytest.mark.parametrize("model_type", ["deepseek_v2", "mistral4", "deepseek_v3"])
def test_groups_of_experts_need_a_bias_of_the_family(model_type):
    """Only with one of its own does a family choose the groups by it as well."""
    groups = {"topk_method": "group_limited_greedy"} if model_type == "deepseek_v2" else {}
    model = build(model_type, n_group=4, topk_group=2, **groups)
    router = find_routers(model)[0]
    block = read_places(model)[router.name.rpartition(".")[0]].module
    if model_type == "deepseek_v3":
        assert find_selection_bias(router, block) == OwnBias("e_score_correction_bias")
    else:
        with pytest.raises(ConfigError, match="does not pick those with the highest scores out of all"):
            find_selection_bias(router, block)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family(model_type):
    """A bias of the family's own is known by its name, which the experiment does not look at."""
    model = build(model_type)
    places = read_places(model)
    for router in find_routers(model):
        block = places[router.name.rpartition(".")[0]].module
        if model_type in NONE:
            with pytest.raises(ConfigError, match=NONE[model_type]):
                find_selection_bias(router, block)
            continue
        own = [name for name in router.module.state_dict() if name.endswith(("correction_bias", "balancing_biases"))]
        way = find_selection_bias(router, block)
        assert isinstance(way, GivenBias) if model_type in GIVEN else way == (OwnBias(*own) if own else TopKBias())
