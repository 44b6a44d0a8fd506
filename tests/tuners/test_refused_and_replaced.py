"""An adapter that is refused, or replaced by one of the same name, leaves nothing of itself in the model."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from tests.families import build, inputs
from trl_moe_ext import MoeEsftConfig, MoeLoraConfig
from trl_moe_ext.errors import ConfigError, PluginError
from trl_moe_ext.kernels.experts_mlp import experts_mlp
from trl_moe_ext.kernels.registry import Kernel
from trl_moe_ext.tuners.moe_lora import adapter_kernels

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
SOME = {FIRST: [0, 2], SECOND: [1]}
OTHERS = {FIRST: [0, 3], SECOND: [1]}


class OnlyPlain:
    """A host of plug-ins with a kernel that takes updates of all experts alone."""

    def lookup(self, hook: str, name: str) -> Kernel:
        return Kernel(name, "of all experts", experts_mlp)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"kernel": "nope"}, PluginError),
        ({"kernel": "reference", "save_activations": "none"}, ConfigError),
        ({"rank_pattern": {f"{FIRST}.1": 0}}, ConfigError),
    ],
)
def test_a_refused_adapter_leaves_the_model_as_it_was(options, error):
    model = build("qwen3_moe")
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error):
        get_peft_model(model, MoeLoraConfig(r=4, **options))
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert not hasattr(model, "peft_config")


def test_a_refused_second_adapter_can_be_tried_again(monkeypatch, tmp_path):
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=4))
    before = {*model.state_dict()}
    with monkeypatch.context() as patch:
        patch.setattr(adapter_kernels, "host", OnlyPlain)
        with pytest.raises(ConfigError, match="runs updates of all experts only"):
            model.add_adapter("second", MoeLoraConfig(r=4, selected_experts=SOME))
    assert {*model.state_dict()} == before
    model.add_adapter("second", MoeLoraConfig(r=4))
    model.set_adapter("second")
    check_file(model, tmp_path, "second")


@pytest.mark.filterwarnings("ignore:(Already found|You are trying to modify)")
def test_experts_are_not_chosen_through_another_adapter():
    """Their names would begin with ``base_model.model``."""
    model = get_peft_model(build("qwen3_moe"), MoeLoraConfig(r=4))
    with pytest.raises(ConfigError, match=r"a PeftModel already.*model\.add_adapter"):
        get_peft_model(model, MoeLoraConfig(r=4, selected_experts=SOME))


LORA = {"r": 4, "moe_target": ["experts"]}
REPLACED = {
    "some experts, then all": (MoeLoraConfig(**LORA, selected_experts=SOME), MoeLoraConfig(**LORA)),
    "some experts, then others": tuple(MoeLoraConfig(**LORA, selected_experts=each) for each in (SOME, OTHERS)),
    "ranks of experts, then one": (MoeLoraConfig(**LORA, rank_pattern={f"{FIRST}.0": 2}), MoeLoraConfig(**LORA)),
    "biases, then none": (MoeLoraConfig(**LORA, router_bias=True), MoeLoraConfig(**LORA)),
    "weights of some, then all": (MoeEsftConfig(selected_experts=SOME), MoeEsftConfig(expert_selection="all")),
    "weights of some, then others": tuple(MoeEsftConfig(selected_experts=each) for each in (SOME, OTHERS)),
}


@pytest.mark.filterwarnings("ignore:(Already found|You are trying to modify)")
@pytest.mark.parametrize("case", REPLACED)
def test_a_cell_that_is_run_twice(case, tmp_path):
    """`get_peft_model` on a model that has the adapter already: PEFT warns, and makes it anew."""
    model = build("qwen3_moe")
    for config in REPLACED[case]:
        peft_model = get_peft_model(model, config)
    assert not any("router_bias" in name for name in peft_model.state_dict())
    check_file(peft_model, tmp_path, "default")


def check_file(model, folder, name):
    """What is saved is what is computed."""
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.1)
    model.save_pretrained(folder, selected_adapters=[name])
    again = PeftModel.from_pretrained(build("qwen3_moe"), folder if name == "default" else folder / name)
    with torch.no_grad():
        expected = model.eval()(**inputs("qwen3_moe")).logits
        assert torch.equal(again.eval()(**inputs("qwen3_moe")).logits, expected)
        with model.disable_adapter():
            assert not torch.equal(model(**inputs("qwen3_moe")).logits, expected)
