"""What is measured is what the model does with the tokens that count."""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeForCausalLM

from tests.families import build, inputs
from tests.router.routed import NOT_REACHED, TYPES, observed
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.census import tiny_config
from trl_moe_ext.profiles import measure
from trl_moe_ext.profiles.measure import measure_profile
from trl_moe_ext.profiles.use import UseStatistics
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.trace import Routing

# Their blocks are called with the choice of experts: no router.
WITHOUT_ROUTER = {"vitpose", "vitpose_backbone"}


@pytest.fixture
def qwen() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(tiny_config("qwen3_moe")).eval()


def batch(rows: int = 3, length: int = 6, seed: int = 0, lengths: list[int] | None = None) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[int(place < of) for place in range(length)] for of in lengths or [length] * rows])
    return {"input_ids": ids, "attention_mask": mask}


def _keep(outputs: dict[str, tuple], name: str, gate: object, args: object, output: tuple) -> None:
    outputs[name] = output


def choices_of(model: Qwen3MoeForCausalLM, batches: list[dict[str, torch.Tensor]]) -> dict[str, list[tuple]]:
    """Gates -> the experts and weights of every token, read from the gates' own outputs."""
    gates = {name: module for name, module in model.named_modules() if name.endswith("mlp.gate")}
    seen: dict[str, list[tuple]] = {name: [] for name in gates}
    for one in batches:
        outputs: dict[str, tuple] = {}
        handles = [gate.register_forward_hook(partial(_keep, outputs, name)) for name, gate in gates.items()]
        with torch.no_grad():
            model(**one)
        for handle in handles:
            handle.remove()
        kept = one["attention_mask"].flatten().bool()
        for name, (_, weights, index) in outputs.items():
            seen[name].extend(zip(index[kept].tolist(), weights[kept].tolist(), strict=True))
    return seen


@pytest.mark.parametrize("limit", [None, 1, 11, 14, 17, 100])
def test_counts_and_weights_of_a_padded_batch_and_of_one_that_is_cut(qwen, limit):
    """Tokens count row by row: 6 + 2 + 3 of the first batch, and 4 + 2 of the second."""
    batches = [batch(lengths=[6, 2, 3]), batch(rows=2, length=4, seed=1, lengths=[4, 2])]
    found = measure_profile(qwen, batches, limit, name="tiny", dataset="noise")
    tokens = min(limit or 17, 17)
    facts = (found.model, found.dataset, found.tokens, found.architecture)
    assert facts == ("tiny", "noise", tokens, "Qwen3MoeForCausalLM")
    expected = choices_of(qwen, batches)
    assert [layer.router for layer in found.layers] == [*expected]
    for layer in found.layers:
        first = expected[layer.router][:tokens]
        counts = Counter(expert for chosen, _ in first for expert in chosen)
        gates: Counter[int] = Counter()
        for chosen, weights in first:
            for expert, weight in zip(chosen, weights, strict=True):
                gates[expert] += weight
        total = counts.total()
        assert total == tokens * layer.top_k
        assert layer.tokens == tokens
        assert layer.token_share == pytest.approx([counts[e] / total for e in range(layer.num_experts)], abs=1e-12)
        assert layer.gate_score == pytest.approx([gates[e] / tokens for e in range(layer.num_experts)], abs=1e-7)


def routing(index: list[list[int]], **given: object) -> Routing:
    facts = {"num_with_weights": 3, "num_experts": 5, "top_k": 2, "label": "0", "name": "gate"}
    return Routing(
        router=SimpleNamespace(**facts),
        logits=torch.tensor([[1.0, 2.0, 3.0, 0.0, 0.0]]).log_softmax(-1).expand(len(index), 5),
        top_k_index=torch.tensor(index),
        **{"top_k_weights": None, "kept": None} | given,
    )


def test_identity_experts_padding_and_a_class_for_none_are_in_no_sum():
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5], [float("nan"), 1.0], [0.1, 0.9]])
    kept = torch.tensor([True, True, False, True])
    sums = UseStatistics.of(routing([[0, 2], [3, 0], [1, 1], [4, -1]], top_k_weights=weights, kept=kept))
    assert sums.tokens == 3
    assert sums.counts.tolist() == [2, 0, 1]
    assert sums.weights.tolist() == pytest.approx([1.25, 0, 0.25])


def test_without_weights_probabilities_stand_for_them():
    sums = UseStatistics.of(routing([[0, 2], [2, 3]]))
    probabilities = torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0]).softmax(-1)
    assert sums.weights.tolist() == pytest.approx([float(probabilities[0]), 0, 2 * float(probabilities[2])])


@pytest.mark.parametrize("model_type", [model_type for model_type in TYPES if model_type not in WITHOUT_ROUTER])
def test_every_family(model_type):
    """Shares are those of the choices that the experts were called with, as the model's own hooks tell them."""
    model = build(model_type)
    modules = dict(model.named_modules())
    found = measure_profile(model, [inputs(model_type)])
    routers = {router.name: router for router in find_routers(model)}
    missing = NOT_REACHED.get(model_type, "\0")
    assert [layer.router for layer in found.layers] == [name for name in routers if missing not in name]
    assert {reason for name, reason in found.left_out.items() if missing in name} <= {measure.NOT_REACHED}
    chosen = {seen.router.name: seen for seen in observed(model_type).routings}
    for layer in found.layers:
        assert layer.num_experts == routers[layer.router].num_with_weights
        assert sum(layer.token_share) == pytest.approx(1)
        assert set(layer.experts) <= modules.keys()
        assert len(layer.fingerprint) == 8
        counts = Counter(chosen[layer.router].top_k_index.flatten().tolist())
        total = sum(counts[expert] for expert in range(layer.num_experts))
        assert layer.token_share == pytest.approx([counts[e] / total for e in range(layer.num_experts)])


def test_both_projections_of_jetmoe_are_named():
    found = measure_profile(build("jetmoe"), [inputs("jetmoe")])
    prefix = "model.layers.0.self_attention.experts."
    assert found.layers[1].experts == (f"{prefix}input_linear", f"{prefix}output_linear")


def test_two_runs_are_equal_and_leave_no_trace(qwen):
    qwen.train()
    qwen.model.layers[0].eval()
    modes = [module.training for module in qwen.modules()]
    state = torch.get_rng_state()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in qwen.modules()]
    first, second = (measure_profile(qwen, [batch(), batch(seed=1)], 20) for _ in range(2))
    assert first == second
    assert [module.training for module in qwen.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in qwen.modules()] == hooks


def test_the_model_is_as_it_was_after_an_error_too(qwen):
    def broken():
        yield batch()
        raise RuntimeError("the network is down")

    qwen.train()
    with pytest.raises(RuntimeError, match="network"):
        measure_profile(qwen, broken())
    assert all(module.training for module in qwen.modules())
    assert not any(module._forward_hooks for module in qwen.modules())


def test_no_more_batches_are_taken_than_needed(qwen):
    taken, told = [], []

    def batches():
        for seed in range(10):
            taken.append(seed)
            yield batch(seed=seed)

    measure_profile(qwen, batches(), 36, on_batch=told.append)
    assert taken == [0, 1]
    assert told == [18, 36]


def test_an_encoder_decoder_has_two_paddings():
    arguments = inputs("switch_transformers")
    mask = torch.ones_like(arguments["input_ids"])
    mask[:, 5:] = 0
    decoder_mask = torch.ones_like(arguments["decoder_input_ids"])
    decoder_mask[0, 9:] = 0
    masks = {"attention_mask": mask, "decoder_attention_mask": decoder_mask}
    found = measure_profile(build("switch_transformers"), [arguments | masks])
    tokens = {layer.router.partition(".")[0]: layer.tokens for layer in found.layers}
    assert tokens == {"encoder": 10, "decoder": 21}
    assert found.tokens == 10


def test_what_runs_is_what_is_measured(qwen):
    """An adapter that changes the routing changes the profile; its names and fingerprints are those of the model."""
    from peft import LoraConfig, get_peft_model

    before = measure_profile(qwen, [batch(rows=8)])
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = get_peft_model(qwen, config)
    after = measure_profile(adapted, [batch(rows=8)])
    assert [layer.token_share for layer in after.layers] != [layer.token_share for layer in before.layers]
    assert after.architecture == before.architecture
    for one, other in zip(before.layers, after.layers, strict=True):
        assert (one.router, one.experts, one.fingerprint) == (other.router, other.experts, other.fingerprint)
    with adapted.disable_adapter():
        assert measure_profile(adapted, [batch(rows=8)]) == before


def test_a_dense_model_is_refused():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    with pytest.raises(ConfigError, match=r"mine \(LlamaForCausalLM\) is dense: it has no routed experts"):
        measure_profile(LlamaForCausalLM(config), [batch()], name="mine")


def test_routers_whose_choice_is_given_are_refused():
    with pytest.raises(ConfigError, match="no router whose choice could be measured: the block is called with"):
        measure_profile(build("vitpose_backbone"), [])


def test_no_data_is_refused(qwen):
    with pytest.raises(ConfigError, match="no router of the model saw a token; nothing is empty"):
        measure_profile(qwen, [], dataset="nothing")


def test_weights_that_are_not_finite_are_refused(qwen):
    qwen.model.layers[0].mlp.gate.weight.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"router model\.layers\.0\.mlp\.gate .* not finite"):
        measure_profile(qwen, [batch()])
