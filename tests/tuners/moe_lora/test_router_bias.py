"""`router_bias`: a bias for the choice of experts that is kept, saved, switched and merged with an adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.families import FAMILIES, build, inputs
from tests.tolerances import assert_gradient_close, assert_output_close, relative_error
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import AdapterFileError, ConfigError
from trl_moe_ext.experts import census
from trl_moe_ext.router.balancing import bias_step
from trl_moe_ext.router.metrics import max_vio
from trl_moe_ext.router.routers import find_routers, routers_left_out
from trl_moe_ext.router.selection import GivenBias, OwnBias, TopKBias
from trl_moe_ext.router.statistics import LayerStatistics
from trl_moe_ext.router.trace import RouterTrace, Routing
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts, router_biases
from trl_moe_ext.tuners.moe_lora.router_bias import RunWithBias

# Families that it cannot be had for, and what the message says.
REFUSED = {
    "dbrx": "the chosen experts and their weights are not in its output",
    "phimoe": "it does not pick those with the highest scores out of all",
    **dict.fromkeys(
        ("doge", "nllb-moe", "switch_transformers", "vitpose_backbone"), "no router chooses among experts that are"
    ),
}
# Bias of its own; handed by the block; none (raw parameter, bias of the logits, scales, dense scores).
OWN, GIVEN, NONE = "deepseek_v3", "minimax_m2", "qwen3_moe"
KINDS = [OWN, GIVEN, NONE, "gpt_oss", "gemma4_text", "llama4_text"]


def adapted(base: nn.Module, **options) -> PeftModel:
    """With factors that are far from zero, the same ones whatever the options are, and biases of zero."""
    model = get_peft_model(base, MoeLoraConfig(r=3, **options)).eval()
    randomise(model)
    return model


def randomise(model: nn.Module, adapter: str = "default") -> None:
    for name, parameter in model.named_parameters():
        if f".{adapter}." in f"{name}." and "lora_" in name and "router_bias" not in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def favour(model: nn.Module, expert: int = 1, adapter: str = "default", by: float = 100.0) -> None:
    """Send every token to one expert, among others."""
    biases = router_biases(model, adapter)
    assert biases
    for bias in biases.values():
        bias[expert] += by


def output(model: nn.Module, kind: str) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return census.output(model, inputs(kind))


def routings(model: nn.Module, kind: str) -> list[Routing]:
    seen: list[Routing] = []
    with RouterTrace(find_routers(model), seen.append):
        output(model, kind)
    return seen


def rarest(routing: Routing) -> int:
    skips = 0 if routing.router.skip_class is None else 1  # tokens that skip have no expert
    return int(LayerStatistics.of(routing).counts[: routing.router.num_experts - skips].argmin())


def chooses(routing: Routing, expert: int) -> bool:
    return bool((routing.top_k_index == expert).any(-1).all())


def documented_way(model_type: str) -> type | None:
    """What docs/options.md says becomes of a bias of this family."""
    page = (Path(__file__).parents[3] / "docs" / "options.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    [text] = [row[1] for row in rows if model_type in row[0].split(", ")]
    ways = {"added to the router's own": OwnBias, "added to the block's own": GivenBias, "the top k are": TopKBias}
    return next((way for words, way in ways.items() if words in text), None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family(model_type):
    base = build(model_type)
    if model_type in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[model_type]):
            get_peft_model(base, MoeLoraConfig(router_bias=True))
        assert not [name for name, _ in base.named_parameters() if "lora_" in name]
        assert documented_way(model_type) is None
        return
    plain = adapted(copy.deepcopy(base))
    model = adapted(copy.deepcopy(base), router_bias=True)
    assert {type(hook.way) for hook in hooks(model)} == {documented_way(model_type)}
    expected = output(plain, model_type)
    assert torch.equal(output(model, model_type), expected), "a bias of zero changes the output"
    # In the last layer alone, so that the hidden states that its router sees are as they were.
    adapted_labels = [r.label for r in find_routers(model) if isinstance(r.experts_module, MoeLoraExperts)]
    biases = router_biases(model)
    assert list(biases) == adapted_labels
    before = [routing for routing in routings(plain, model_type) if routing.router.label in biases][-1]
    label, expert = before.router.label, rarest(before)
    biases[label][expert] = 100.0
    after = next(routing for routing in routings(model, model_type) if routing.router.label == label)
    assert not chooses(before, expert)
    assert chooses(after, expert)
    assert torch.equal(after.logits, before.logits)
    assert relative_error(output(model, model_type), expected) > 1e-4
    favour(model)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(output(model, model_type), output(plain, model_type))


@pytest.mark.parametrize("router_mode", ["frozen", "lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_with_the_adapter(kind, router_mode, tmp_path):
    base = build(kind)
    model = adapted(copy.deepcopy(base), router_bias=True, router_mode=router_mode)
    favour(model)
    expected = output(model, kind)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["router_bias"] is True
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(output(loaded, kind), expected)
    base.load_adapter(str(tmp_path))
    assert torch.equal(output(base.eval(), kind), expected)
    for one, other in ((loaded, model), (base, model)):
        assert {label: bias.tolist() for label, bias in router_biases(one).items()} == {
            label: bias.tolist() for label, bias in router_biases(other).items()
        }


def test_it_is_never_trained_and_stays_in_float32(tmp_path):
    model = adapted(build(NONE, torch.bfloat16), router_bias=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(NONE, torch.bfloat16), tmp_path, is_trainable=True)
    for one in (model, loaded):
        one.train()
        favour(one, by=1e-4)
        one(**inputs(NONE)).logits.sum().backward()
        one.set_adapter("default")
        biases = [p for name, p in one.named_parameters() if "router_bias" in name]
        assert len(biases) == 2
        for bias in biases:
            assert (bias.dtype, bias.requires_grad, bias.grad) == (torch.float32, False, None)
            assert bias[1] == torch.tensor(1e-4)


def test_who_has_the_biases_may_move_them_wherever_the_model_is():
    model = adapted(build("deepseek_v3"), router_bias=True)
    biases = router_biases(model)
    model.to(torch.bfloat16)  # a cast, like a move to a device, puts other memory behind every parameter
    for bias in biases.values():
        bias[1] = 100.0
    assert all(chooses(routing, 1) for routing in routings(model, "deepseek_v3"))


def test_a_file_without_it_is_refused(tmp_path):
    adapted(build(NONE), router_bias=True).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "router_bias" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match=r"missing from the file: .*lora_router_bias"):
        PeftModel.from_pretrained(build(NONE), tmp_path)
    with pytest.raises(AdapterFileError, match=r"missing from the file: .*lora_router_bias"):
        build(NONE).load_adapter(str(tmp_path))


def stored_biases(model: nn.Module) -> dict[str, Tensor]:
    """Those of the family."""
    names = ("correction_bias", "expert_bias", "balancing_biases")
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(names)}


@pytest.mark.parametrize("router_mode", ["frozen", "full"])
@pytest.mark.parametrize("kind", [OWN, GIVEN, "laguna", "ernie4_5_moe", "zaya"])
def test_merged_into_the_bias_of_the_family(kind, router_mode):
    base = build(kind)
    own, plain = stored_biases(base), output(base, kind)
    keys = base.state_dict().keys()
    model = adapted(base, router_bias=True, router_mode=router_mode)
    favour(model, by=0.5)
    expected = output(model, kind)
    model.merge_adapter()
    assert_output_close(output(model, kind), expected, torch.float32)
    with model.disable_adapter():
        assert_output_close(output(model, kind), plain, torch.float32)
    merged = model.merge_and_unload()
    assert_output_close(output(merged, kind), expected, torch.float32)
    assert merged.state_dict().keys() == keys
    for name, bias in stored_biases(merged).items():
        difference = torch.zeros(bias.numel())
        difference[1] = 0.5
        torch.testing.assert_close(bias.flatten() - own[name].flatten(), difference)
    assert not hooks(merged)


def hooks(model: nn.Module) -> list[RunWithBias]:
    return [hook for m in model.modules() for hook in m._forward_hooks.values() if isinstance(hook, RunWithBias)]


@pytest.mark.parametrize("kind", [OWN, GIVEN])
def test_unmerging_gives_back_every_bit(kind):
    base = build(kind)
    own = stored_biases(base)
    model = adapted(base, router_bias=True)
    favour(model, by=1 / 3)
    for names in (None, ["default"]):
        model.merge_adapter(names)
        assert not all(
            torch.equal(t, own[n.removeprefix("base_model.model.")]) for n, t in stored_biases(model).items()
        )
        model.unmerge_adapter()
        assert all(torch.equal(t, own[n.removeprefix("base_model.model.")]) for n, t in stored_biases(model).items())


@pytest.mark.parametrize("kind", [NONE, "gpt_oss"])
def test_a_family_without_a_bias_cannot_take_one(kind):
    model = adapted(build(kind), router_bias=True)
    expected = output(model, kind)
    last = [m for m in model.modules() if isinstance(m, MoeLoraExperts)][-1]
    bias = last.lora_router_bias["default"].bias
    bias[0] = 1e-3  # in the last layer alone: the first must not be merged either
    changed, weights = output(model, kind), {name: t.clone() for name, t in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload, last.merge):
        with pytest.raises(
            ConfigError, match=r"cannot be merged: its router_bias of 'model.layers.1.mlp.* is not zero"
        ):
            merge()
        assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
        assert torch.equal(output(model, kind), changed)
    bias.zero_()
    assert_output_close(output(model.merge_and_unload(), kind), expected, torch.float32)


def test_unloading_leaves_no_trace():
    base = build(NONE)
    expected = output(base, NONE)
    model = adapted(base, router_bias=True)
    favour(model)
    assert len(hooks(model)) == 2
    unloaded = model.unload()
    assert not hooks(unloaded)
    assert torch.equal(output(unloaded, NONE), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_biases_of_their_own(kind):
    model = adapted(build(kind), router_bias=True)
    model.add_adapter("second", MoeLoraConfig(r=2, router_bias=True))
    model.add_adapter("without", MoeLoraConfig(r=2))
    favour(model)
    favour(model, expert=2, adapter="second")
    assert router_biases(model, "without") == {}
    first = output(model, kind)
    assert all(chooses(routing, 1) for routing in routings(model, kind))
    model.set_adapter("second")
    assert all(chooses(routing, 2) for routing in routings(model, kind))
    model.set_adapter("without")
    assert not all(chooses(routing, 1) or chooses(routing, 2) for routing in routings(model, kind))
    model.base_model.set_adapter(["default", "second"])
    both = routings(model, kind)
    assert all(chooses(r, 1) and chooses(r, 2) for r in both if r.router.top_k > 1)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert router_biases(model, "second") == {}
    assert torch.equal(output(model, kind), first)


@pytest.mark.parametrize("kind", [OWN, NONE])
def test_the_copy_of_a_router_runs_with_the_bias_of_its_adapter(kind):
    """Copies are made with the hooks of the original on them, before and after there are biases."""
    model = adapted(build(kind), router_mode="full")
    model.add_adapter("second", MoeLoraConfig(r=2, router_mode="full", router_bias=True))
    model.add_adapter("third", MoeLoraConfig(r=2, router_mode="full", router_bias=True))
    favour(model, expert=2, adapter="second")
    favour(model, expert=3, adapter="third")
    for adapter, expert in (("second", 2), ("third", 3)):
        model.set_adapter(adapter)
        assert all(chooses(routing, expert) for routing in routings(model, kind))
    experts = {id(m) for m in model.modules() if isinstance(m, MoeLoraExperts)}
    assert {id(hook.experts) for hook in hooks(model)} == experts
    model.set_adapter("default")
    assert not all(chooses(routing, 2) or chooses(routing, 3) for routing in routings(model, kind))


@pytest.mark.parametrize("router_mode", ["frozen", "full"])
def test_a_copy_of_the_model_has_biases_of_its_own(router_mode):
    model = adapted(build(NONE), router_bias=True, router_mode=router_mode)
    favour(model)
    expected, twin = output(model, NONE), copy.deepcopy(model)
    assert torch.equal(output(twin, NONE), expected)
    favour(model, expert=1, by=-100.0)
    assert torch.equal(output(twin, NONE), expected)
    favour(twin, expert=1, by=-100.0)
    assert torch.equal(output(twin, NONE), output(model, NONE))
    favour(twin, expert=2)
    assert all(chooses(routing, 2) for routing in routings(twin, NONE))
    assert not any(chooses(routing, 2) for routing in routings(model, NONE))


def test_the_reference_adapter_of_trl_has_the_same_biases():
    """DPO, GRPO and KTO copy the parameters of an adapter into one called ref."""
    model = adapted(build(NONE), router_bias=True, router_mode="full")
    favour(model)
    expected = output(model, NONE)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(output(model, NONE), expected)


def test_without_peft_model_too():
    """transformers adds adapters to a model itself."""
    model = build(NONE)
    model.add_adapter(MoeLoraConfig(r=3, router_bias=True))
    favour(model)
    assert all(chooses(routing, 1) for routing in routings(model, NONE))
    model.disable_adapters()
    assert torch.equal(output(model, NONE), output(build(NONE), NONE))


def test_who_watches_the_router_sees_what_the_experts_get():
    base = build(NONE)
    router = base.model.layers[1].mlp.gate
    seen: list[Tensor] = []
    router.register_forward_hook(lambda module, args, output: seen.append(output[2]))
    model = adapted(base, router_bias=True)
    favour(model)
    called: list[Tensor] = []
    experts = [m for m in model.modules() if isinstance(m, MoeLoraExperts)][-1]
    experts.register_forward_pre_hook(lambda module, args: called.append(args[1]))
    output(model, NONE)
    assert len(seen) == len(called) == 1
    assert torch.equal(seen[0], called[0])
    assert (seen[0] == 1).any(-1).all()


@pytest.mark.parametrize("kind", [OWN, NONE, "gemma4_text"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    found = []
    for is_checkpointed in (False, True):
        model = adapted(build(kind), router_bias=True, router_mode="full").train()
        favour(model)
        if is_checkpointed:
            base = model.get_base_model()
            # Its name from transformers 5.23 on, and the one before.
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        torch.manual_seed(0)
        census.output(model, inputs(kind)).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any("modules_to_save" in name for name in found[0])
    for name, gradient in found[0].items():
        if gradient.abs().max() > 0:
            assert_gradient_close(found[1][name], gradient, torch.float32, name)


def loads(model: nn.Module, tokens: Tensor) -> dict[str, LayerStatistics]:
    seen: list[Routing] = []
    with torch.no_grad(), RouterTrace(find_routers(model), seen.append):
        model(input_ids=tokens)
    return {routing.router.label: LayerStatistics.of(routing) for routing in seen}


# The step is in the units of what a family ranks its experts by.
@pytest.mark.parametrize(("kind", "rate"), [(OWN, 0.01), (GIVEN, 0.01), (NONE, 0.01), ("gemma4_text", 1e-4)])
def test_moved_by_the_load_it_balances_the_experts(kind, rate):
    """The rule that the trainer follows, on one batch over and over."""
    model = adapted(build(kind), router_bias=True)
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))
    start = loads(model, tokens)
    for _ in range(60):
        for label, layer in loads(model, tokens).items():
            bias = router_biases(model)[label]
            bias.copy_(bias_step(bias, layer.counts, rate))
    end = loads(model, tokens)
    for label, layer in start.items():
        assert float(max_vio(end[label])) < max(0.5 * float(max_vio(layer)), 0.2)


def test_layers_without_adapted_experts_have_none():
    model = adapted(build(NONE), router_bias=True, layers_to_transform=[1])
    assert list(router_biases(model)) == ["1"]
    favour(model)
    first, last = routings(model, NONE)
    assert (chooses(first, 1), chooses(last, 1)) == (False, True)


def test_layers_without_a_router_have_none():
    model = adapted(build("deepseek_v4"), router_bias=True)
    assert routers_left_out(model)
    biased = [name for name, m in model.named_modules() if isinstance(m, MoeLoraExperts) and len(m.lora_router_bias)]
    assert len(biased) == len(find_routers(model)) == 1


def test_a_bias_without_adapted_experts_is_refused():
    with pytest.raises(ConfigError, match=r"router_bias has no effect: .* add 'experts' to moe_target"):
        MoeLoraConfig(router_bias=True, moe_target=["attention"])
    with pytest.raises(ConfigError, match="router_bias has no effect: no router chooses among experts"):
        get_peft_model(build(NONE), MoeLoraConfig(router_bias=True, moe_target=[], target_modules=["q_proj"]))
