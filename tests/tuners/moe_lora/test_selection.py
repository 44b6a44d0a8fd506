"""Factors for some experts only: chosen by a profile or by hand, saved, loaded, merged, beside another adapter."""

from __future__ import annotations

import copy
import json
from itertools import permutations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.families import build, inputs
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import AdapterFileError, ConfigError
from trl_moe_ext.experts.census.weights import randomise_factors
from trl_moe_ext.profiles.measure import measure_profile
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
INPUTS = inputs("qwen3_moe")
SELECTED = {LAYERS[0]: [1, 3], LAYERS[1]: [0]}


@pytest.fixture
def stock():
    model = build("qwen3_moe", torch.float64)
    model.config._experts_implementation = "eager"
    return model.eval()


@pytest.fixture
def profile(stock, tmp_path):
    batches = [INPUTS]
    found = measure_profile(stock, batches, name="tiny", dataset="random tokens")
    found.save(tmp_path / "profile.json")
    return found, tmp_path / "profile.json"


def adapted(stock, seed=3, **options):
    config = MoeLoraConfig(**{"r": 4, "moe_target": ["experts"]} | options)
    model = get_peft_model(copy.deepcopy(stock), config, autocast_adapter_dtype=False).eval()
    randomise_factors(model, "default", seed)
    return model


def output(model):
    with torch.no_grad():
        return model(**INPUTS).logits


def experts_layers(model):
    return [module for module in model.modules() if isinstance(module, MoeLoraExperts)]


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_only_the_chosen_experts_have_factors(stock):
    model = adapted(stock, selected_experts=SELECTED)
    for layer, experts in zip(experts_layers(model), SELECTED.values(), strict=True):
        assert {p.shape[0] for p in layer.lora_A.parameters()} == {len(experts)}
    every = trained(adapted(stock))
    experts = experts_layers(model)[0].layout.num_experts
    assert trained(model) == every * 3 // (2 * experts)


def test_chosen_experts_act_as_with_factors_of_all_that_are_zero_elsewhere(stock):
    some, every = adapted(stock, selected_experts=SELECTED), adapted(stock)
    for ours, theirs, chosen in zip(experts_layers(some), experts_layers(every), SELECTED.values(), strict=True):
        for name, factor in ours.lora_B["default"].named_parameters():
            full = theirs.lora_B["default"].get_parameter(name).data
            full.zero_()[chosen] = factor.data
            theirs.lora_A["default"].get_parameter(name).data[chosen] = ours.lora_A["default"].get_parameter(name).data
    torch.testing.assert_close(output(some), output(every), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(output(some), output(stock))


def test_merging_changes_the_chosen_experts_and_no_other(stock):
    merged = adapted(stock, selected_experts=SELECTED).merge_and_unload()
    for name, chosen in SELECTED.items():
        before, after = stock.get_submodule(name), merged.get_submodule(name)
        for stack, weight in before.named_parameters():
            changed = (weight != after.get_parameter(stack)).flatten(1).any(1)
            assert changed.nonzero().flatten().tolist() == chosen


def test_a_saved_adapter_needs_no_profile(stock, profile, tmp_path):
    _, path = profile
    model = adapted(stock, expert_selection=f"profile:{path}", experts_per_layer=2)
    model.save_pretrained(tmp_path / "adapter")
    path.unlink()
    loaded = PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    assert torch.equal(output(loaded), output(model))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {len(experts) for experts in config["selected_experts"].values()} == {2}


def test_a_profile_chooses_the_most_used(stock, profile):
    use, path = profile
    model = adapted(stock, expert_selection=f"profile:{path}", experts_per_layer=1)
    selected = model.peft_config["default"].selected_experts
    for layer in use.layers:
        hottest = max(range(layer.num_experts), key=lambda e: (layer.token_share[e], -e))
        assert [selected[name] for name in layer.experts] == [[hottest]]


def test_coverage_chooses_as_many_as_are_needed(stock, profile):
    use, path = profile
    selected = adapted(stock, expert_selection=f"profile:{path}", expert_coverage=0.6).peft_config["default"]
    for layer in use.layers:
        for name in layer.experts:
            chosen = selected.selected_experts[name]
            covered = sum(layer.token_share[expert] for expert in chosen)
            least = min(layer.token_share[expert] for expert in chosen)
            assert covered >= 0.6 - 1e-9 > covered - least - 1e-9


def test_two_adapters_with_different_experts(stock):
    model = adapted(stock, selected_experts=SELECTED)
    first = output(model)
    other = {LAYERS[0]: [0, 1, 2], LAYERS[1]: [3]}
    model.add_adapter("second", MoeLoraConfig(r=2, moe_target=["experts"], selected_experts=other))
    randomise_factors(model, "second", 9)
    assert torch.equal(output(model), first)
    model.set_adapter("second")
    second = output(model)
    model.base_model.set_adapter(["default", "second"])
    both = output(model)
    merged = model.merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(output(merged), both, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(both, first)
    assert not torch.allclose(both, second)


def test_factors_are_not_loaded_for_other_experts(stock, tmp_path):
    adapted(stock, selected_experts=SELECTED).save_pretrained(tmp_path)
    other = adapted(stock, selected_experts={LAYERS[0]: [1, 2], LAYERS[1]: [0]})
    with pytest.raises(AdapterFileError, match=r"of other experts.*\[1, 3\] instead of \[1, 2\]"):
        other.load_adapter(tmp_path, "default")


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        ({"model.layers.7.mlp.experts": [0]}, "no such experts"),
        ({LAYERS[0]: [99]}, "expert 99 .* is selected"),
        ({LAYERS[0]: [1, 1]}, "different indices"),
        ({LAYERS[0]: []}, "different indices"),
    ],
)
def test_experts_that_there_are_not(stock, selected, message):
    with pytest.raises(ConfigError, match=message):
        adapted(stock, selected_experts=selected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_selection": "some"}, "is unknown"),
        ({"expert_selection": "profile:p.json"}, "does not say how many"),
        ({"expert_coverage": 0.5}, "no effect without a profile"),
        ({"expert_selection": "profile:p.json", "expert_coverage": 0.5, "experts_per_layer": 2}, "leave one of them"),
        ({"expert_selection": "profile:p.json", "expert_coverage": 1.5}, "not a part of the choices"),
        ({"expert_selection": "profile:p.json", "experts_per_layer": 0}, "not a number of experts"),
        ({"expert_selection": "profile:p.json", "experts_per_layer": 2, "expert_score": "share"}, "did you mean"),
        ({"expert_rank": "by_share"}, "no effect without a profile"),
        ({"expert_rank": "by_share", "expert_selection": "profile:p.json", "r": 1}, "no effect with rank 1"),
        ({"expert_score": "gate_score"}, "no effect without a profile"),
        ({"expert_selection": None}, "is unknown"),
        ({"selected_experts": {LAYERS[0]: 3}}, "use a list"),
        ({"selected_experts": {LAYERS[0]: [True]}}, "use a list"),
        ({"expert_rank": "by_use"}, "did you mean|known"),
        ({"selected_experts": SELECTED, "moe_target": ["attention"]}, "leaves the experts out"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(**options)


def test_layers_that_a_choice_by_hand_does_not_name_are_told(stock):
    with pytest.warns(UserWarning, match=r"no experts are chosen of model.layers.1.mlp.experts: all of them are"):
        adapted(stock, selected_experts={LAYERS[0]: [1]})


def test_a_selection_of_all_is_told(stock, profile):
    with pytest.warns(UserWarning, match="leaves no expert out"):
        adapted(stock, expert_selection=f"profile:{profile[1]}", experts_per_layer=99)


def test_a_rank_for_an_expert_that_is_not_selected(stock):
    with pytest.raises(ConfigError, match=r"names expert 2 of .*, which is not selected"):
        adapted(stock, selected_experts=SELECTED, rank_pattern={"layers.0.mlp.experts.2": 8})


def test_a_profile_of_another_model_is_refused_and_leaves_the_model_as_it_was(stock, profile):
    _, path = profile
    other = build("mixtral", torch.float64)
    names = [name for name, _ in other.named_modules()]
    with pytest.raises(ConfigError, match="of another model"):
        get_peft_model(other, MoeLoraConfig(expert_selection=f"profile:{path}", experts_per_layer=1))
    assert [name for name, _ in other.named_modules()] == names


# -- rank by use -------------------------------------------------------------------------------------------------


def test_ranks_by_share_keep_the_number_of_parameters(stock, profile, tmp_path):
    use, path = profile
    model = adapted(stock, expert_selection=f"profile:{path}", expert_rank="by_share")
    assert trained(model) <= trained(adapted(stock))
    ranks = model.peft_config["default"].to_dict()["rank_pattern"]
    for layer in use.layers:
        own = [ranks[f"{layer.experts[0]}.{expert}"] for expert in range(layer.num_experts)]
        pairs = permutations(zip(layer.token_share, own, strict=True), 2)
        assert all(rank >= other for (share, rank), (less, other) in pairs if share > less)
        assert len({*own}) > 1
    model.save_pretrained(tmp_path / "adapter")
    path.unlink()
    loaded = PeftModel.from_pretrained(copy.deepcopy(stock), tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    assert torch.equal(output(loaded), output(model))
    torch.testing.assert_close(output(model.merge_and_unload()), output(loaded), rtol=1e-9, atol=1e-11)


def test_a_rank_of_one_expert(stock, tmp_path):
    model = adapted(stock, rank_pattern={"layers.1.mlp.experts.2": 8}, use_rslora=True)
    state_file = tmp_path / "adapter_model.safetensors"
    model.save_pretrained(tmp_path)
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(state_file).items() if "layers.1" in key}
    experts = experts_layers(model)[1].layout.num_experts
    prefix = f"base_model.model.{LAYERS[1]}"
    assert shapes[f"{prefix}.lora_A.down_proj_r8"][:2] == (1, 8)
    assert shapes[f"{prefix}.lora_A.down_proj_r4"][:2] == (experts - 1, 4)
    expected = output(model)
    torch.testing.assert_close(output(model.merge_and_unload()), expected, rtol=1e-9, atol=1e-11)


def test_scaling_follows_the_rank_as_for_a_module(stock):
    layer = experts_layers(adapted(stock, lora_alpha=16, rank_pattern={"layers.1.mlp.experts.2": 8}))[1]
    assert {u.A.shape[1]: u.scaling for u in layer.updates("default", layer.layout.down)} == {4: 4.0, 8: 2.0}


def test_training_moves_the_chosen_experts_alone_and_resumes_exactly(stock, tmp_path):
    def steps(model, number):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for _ in range(number):
            model(**INPUTS).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    model = adapted(stock, selected_experts=SELECTED)
    steps(model, 2)
    model.save_pretrained(tmp_path)
    again = adapted(stock, seed=8, selected_experts=SELECTED)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    steps(model, 2)
    steps(again, 2)
    assert torch.equal(output(again), output(model))
    base = model.unload()
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), stock.state_dict().values(), strict=True))
