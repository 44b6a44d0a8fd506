"""`router_mode`: the router frozen, under LoRA, or trained as a copy that is saved, loaded, switched and merged."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.families import FAMILIES, build, inputs, randomise_factors
from tests.tolerances import assert_gradient_close, assert_output_close, relative_error
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import AdapterFileError, ConfigError
from trl_moe_ext.experts import census
from trl_moe_ext.router.routers import find_routers

# A raw (E, H) parameter; one with a bias; a buffer beside it; a Linear and scales inside; dense scores; and Mixtral.
KINDS = ["qwen3_moe", "gpt_oss", "deepseek_v3", "gemma4_text", "llama4_text", "mixtral"]
# The data set picks the experts.
WITHOUT_ROUTER = {"vitpose_backbone"}
# Where no other logit is near the largest, its weight is one, and no gradient reaches the logits.
WITHOUT_GRADIENT = {"phimoe"}


def full(**options) -> MoeLoraConfig:
    return MoeLoraConfig(r=3, router_mode="full", **options)


def stock_model(kind: str) -> nn.Module:
    """In float64, with the family's own loop over the experts."""
    model = build(kind, torch.float64)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # the only one that takes float64
    return model


def perturb_routers(model: nn.Module) -> None:
    """Move the copies that run now far enough to change the routing."""
    generator = torch.Generator().manual_seed(4)
    for router in find_routers(model):
        for parameter in router.own.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.data += 0.3 * noise


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def output(model: nn.Module, kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return census.output(model, inputs(kind))


def trained(base: nn.Module, kind: str, **options) -> nn.Module:
    model = get_peft_model(base, full(**options)).eval()
    randomise_factors(model)
    before = output(model, kind)
    perturb_routers(model)
    assert relative_error(output(model, kind), before) > 1e-3, "the routers do not matter: nothing would be tested"
    return model


def test_the_gradient_is_that_of_full_fine_tuning(kind):
    stock = stock_model(kind).requires_grad_(False)
    model = get_peft_model(copy.deepcopy(stock), full(), autocast_adapter_dtype=False).eval()
    routers = find_routers(stock)
    weights = {f"{r.name}.{n}": p.requires_grad_() for r in routers for n, p in r.module.named_parameters()}
    direction = None
    found = {}
    for which in (stock, model):
        hidden = census.output(which, inputs(kind))
        direction = torch.randn_like(hidden) if direction is None else direction
        (hidden * direction).sum().backward()
    for router in find_routers(model):
        found |= {f"{router.name}.{n}": p.grad for n, p in router.own.named_parameters()}
    assert found.keys() == weights.keys()
    assert any(p.grad.abs().max() > 0 for p in weights.values())
    for name, weight in weights.items():
        assert_gradient_close(found[name], weight.grad, torch.float64, name)


def test_only_the_copies_are_trained_and_the_base_comes_back(kind):
    base = build(kind)
    model = trained(copy.deepcopy(base), kind)
    for router, stock in zip(find_routers(model), find_routers(base), strict=True):
        assert all(p.requires_grad for p in router.own.parameters())
        original = dict(router.module.original_module.named_parameters())
        for name, parameter in stock.module.named_parameters():
            assert torch.equal(original[name], parameter)
            assert not original[name].requires_grad
    plain = get_peft_model(copy.deepcopy(base), MoeLoraConfig(r=3)).eval()
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(output(model, kind), output(plain, kind))


def test_a_saved_copy_is_loaded_to_the_last_bit(kind, tmp_path):
    base = build(kind)
    model = trained(copy.deepcopy(base), kind)
    expected = output(model, kind)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["router_mode"] == "full"
    assert config["modules_to_save"] == [router.name for router in find_routers(base)]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    assert torch.equal(output(loaded, kind), expected)
    assert loaded.peft_config["default"].modules_to_save == config["modules_to_save"]
    assert all(p.requires_grad for router in find_routers(loaded) for p in router.own.parameters())
    base.load_adapter(str(tmp_path))
    assert torch.equal(output(base.eval(), kind), expected)


def test_merging_puts_the_copies_in_place(kind):
    base = build(kind)
    classes, keys = [type(m) for m in base.modules()], base.state_dict().keys()
    model = trained(base, kind)
    expected = output(model, kind)
    copies = [copy.deepcopy(router.own.state_dict()) for router in find_routers(model)]
    merged = model.merge_and_unload()
    assert_output_close(output(merged, kind), expected, torch.float32)
    assert ([type(m) for m in merged.modules()], merged.state_dict().keys()) == (classes, keys)
    for router, copied in zip(find_routers(merged), copies, strict=True):
        assert all(torch.equal(tensor, copied[name]) for name, tensor in router.module.state_dict().items())


def test_two_adapters_have_copies_of_their_own(kind):
    model = trained(build(kind), kind)
    first = output(model, kind)
    model.add_adapter("second", full())
    model.add_adapter("frozen", MoeLoraConfig(r=2))
    assert torch.equal(output(model, kind), first)
    model.set_adapter("frozen")
    with model.disable_adapter():
        base = output(model, kind)
    assert_output_close(output(model, kind), base, torch.float32)
    model.set_adapter("second")
    assert_output_close(output(model, kind), base, torch.float32)
    perturb_routers(model)
    second = output(model, kind)
    assert relative_error(second, base) > 1e-3
    model.set_adapter("default")
    assert torch.equal(output(model, kind), first)
    twin = copy.deepcopy(model)
    assert_output_close(output(twin.merge_and_unload(adapter_names=["second"]), kind), second, torch.float32)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(output(model, kind), second)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family(model_type):
    """A copy changes nothing at first, holds no experts, gets a gradient, and merges without a trace."""
    base = stock_model(model_type)
    keys = base.state_dict().keys()
    if model_type in WITHOUT_ROUTER:
        with pytest.raises(ConfigError, match="the model has no router that is learned"):
            get_peft_model(base, full())
        return
    stock = output(base, model_type)
    model = get_peft_model(base, full(), autocast_adapter_dtype=False).eval()
    census.output(model, inputs(model_type)).square().sum().backward()
    copied = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    assert copied
    assert not [name for name in copied if "experts." in name.partition(".modules_to_save.")[2]]
    reached = any(p.grad is not None and p.grad.abs().max() > 0 for p in copied.values())
    assert reached or model_type in WITHOUT_GRADIENT
    assert_output_close(output(model, model_type), stock, torch.float32)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == keys


def copied_layers(model: nn.Module) -> set[str]:
    names = {
        name.partition(".modules_to_save.")[0] for name, _ in model.named_parameters() if "modules_to_save" in name
    }
    return {name.removeprefix("base_model.model.") for name in names}


@pytest.mark.parametrize(
    "options",
    [{"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.mlp.gate"]}, {"exclude_modules": r".*\.0\..*"}],
    ids=str,
)
def test_layers_that_are_left_out_keep_their_router(options):
    model = get_peft_model(build("qwen3_moe"), full(**options))
    assert copied_layers(model) == {"model.layers.1.mlp.gate"}


def test_what_the_user_saves_is_saved_too(tmp_path):
    model = get_peft_model(build("qwen3_moe"), full(modules_to_save=["lm_head"]))
    assert copied_layers(model) == {"model.layers.0.mlp.gate", "model.layers.1.mlp.gate", "lm_head"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)
    assert copied_layers(loaded) == copied_layers(model)


def test_lora_is_a_word_of_moe_target():
    by_mode = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3, router_mode="lora"))
    by_word = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3, moe_target=["experts", "attention", "router"]))
    names = [name for name, p in by_mode.named_parameters() if p.requires_grad]
    assert names == [name for name, p in by_word.named_parameters() if p.requires_grad]
    assert any(".gate." in name for name in names)


# Options, and what the message must say: what is wrong, and the way out.
REFUSED = [
    ({"router_mode": "ful"}, "router_mode: 'ful' is unknown; did you mean full"),
    (
        {"router_mode": "full", "moe_target": ["experts", "router"]},
        "'full' contradicts 'router' in moe_target.*'lora'",
    ),
    ({"router_mode": "frozen", "moe_target": "router"}, "'frozen' contradicts 'router' in moe_target.*'lora'"),
    ({"router_mode": "full", "moe_target": []}, "moe_target is empty: PEFT trains copies .* router_mode='lora'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_modes_that_contradict_other_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(**options)


# The same for what only the model can tell.
REFUSED_ON_A_MODEL = [
    (
        "qwen3_moe",
        {"router_mode": "full", "target_parameters": ["mlp.gate.weight"]},
        r"LoRA on .*0\.mlp\.gate\.weight'",
    ),
    ("gemma4_text", {"router_mode": "frozen", "target_modules": ["q_proj", "proj"]}, r"LoRA on .*0\.router\.proj'"),
    ("gemma4_text", {"router_mode": "full", "target_modules": r".*\.proj"}, r"LoRA on .*0\.router\.proj'"),
    ("qwen3_moe", {"router_mode": "frozen", "modules_to_save": ["gate"]}, r"modules_to_save=\['gate'\], which trains"),
    ("qwen3_moe", {"router_mode": "full", "exclude_modules": ["gate"]}, "trains nothing: .* leave none of 2 routers"),
]


@pytest.mark.parametrize(
    ("kind", "options", "message"), REFUSED_ON_A_MODEL, ids=[str(o) for _, o, _ in REFUSED_ON_A_MODEL]
)
def test_modes_that_contradict_the_model_are_refused(kind, options, message):
    model = build(kind)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model, MoeLoraConfig(**options))
    assert not [name for name, _ in model.named_parameters() if "lora_" in name or "original_module" in name]


def test_a_quantised_router_is_refused():
    model = build("gemma4_text")
    packed = nn.Parameter(torch.zeros(256, 1, dtype=torch.uint8), requires_grad=False)  # as bitsandbytes keeps it
    model.model.layers[1].router.proj.weight = packed
    with pytest.raises(ConfigError, match=r"train model.layers.1.router.proj.weight \(torch.uint8\): .*\['router'\]"):
        get_peft_model(model, full())


def test_a_dense_model_has_no_router_to_train():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(ConfigError, match=r"the model has no router that is learned\. Leave router_mode out"):
        get_peft_model(AutoModelForCausalLM.from_config(config), full())


@pytest.mark.parametrize("first", ["lora", "full"])
def test_a_copy_and_lora_on_the_same_router_are_refused(first):
    second = {"lora": "full", "full": "lora"}[first]
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=3, router_mode=first))
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(
        ConfigError, match=r"adapter 'default' .* the router 'model.layers.0.mlp.gate'.*same router_mode"
    ):
        model.add_adapter("second", MoeLoraConfig(r=3, router_mode=second))
    assert [name for name, _ in model.named_parameters()] == before


def test_an_adapter_of_another_model_is_refused(tmp_path):
    get_peft_model(build("qwen3_moe"), full(exclude_modules=["layers.1.mlp.gate"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"exclude_modules": None}))
    with pytest.raises(AdapterFileError, match=r"it has no copy of the router 'model.layers.1.mlp.gate'"):
        PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)


@pytest.mark.parametrize("by_transformers", [False, True])
def test_a_copy_with_a_nan_is_refused(tmp_path, by_transformers):
    get_peft_model(build("qwen3_moe"), full()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.gate.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    base = build("qwen3_moe")
    with pytest.raises(AdapterFileError, match=r"holds NaN or infinite values: in: .*layers.1.mlp.gate"):
        base.load_adapter(str(tmp_path)) if by_transformers else PeftModel.from_pretrained(base, tmp_path)
