"""What MOE_LORA promises on every MoE family of transformers: the checks of ``python -m trl_moe_ext.experts.census``.

Their yardstick is the family's own code in float64, in its eager implementation, with the merged weight ``W + s B A``
put in place of W. It shares nothing with the grouped kernels.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.families import COMPOSITES, FAMILIES, build, inputs, randomise_factors
from tests.tolerances import assert_output_close
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.experts import census
from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.experts.census import checks
from trl_moe_ext.kernels.low_rank import LowRank
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts

# transformers gives it no forward: its parts, such as qwen3_omni_moe_thinker, are types of their own.
WITHOUT_FORWARD = {"qwen3_omni_moe"}
# Experts that are Linears or Embeddings of their own take PEFT's ordinary LoRA: there are no stacks to group.
ORDINARY_LORA = {"doge", "nllb-moe", "switch_transformers", "vitpose", "vitpose_backbone"}


@pytest.mark.parametrize("check", checks.CHECKS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_family(model_type, check):
    checks.CHECKS[check](model_type)


@pytest.mark.slow
@pytest.mark.parametrize("check", checks.CHECKS)
@pytest.mark.parametrize("model_type", sorted({*COMPOSITES} - WITHOUT_FORWARD))
def test_composite(model_type, check):
    checks.CHECKS[check](model_type)


def test_the_families_are_those_that_transformers_has():
    """If not, transformers is another version: run the census, then bring tests/data/model_types.json up to date."""
    found = census.discover()
    assert (list(found.own), list(found.composite)) == (FAMILIES, COMPOSITES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts_in_stacks_take_the_grouped_path(model_type):
    anatomy = read_anatomy(census.skeleton(model_type).named_modules())
    assert bool(anatomy.experts) is (model_type not in ORDINARY_LORA)
    assert bool(anatomy.expert_linears) is (model_type in ORDINARY_LORA)


MUTATIONS = {
    "without the low-rank term": lambda A, B: (A, B * 0),
    "with two experts swapped": lambda A, B: (A, B[[1, 0, *range(2, len(B))]]),
    "with B transposed": lambda A, B: (A, B.reshape(B.shape[0], B.shape[2], B.shape[1]).mT),
    "with A of the wrong scale": lambda A, B: (A * 1.01, B),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "jetmoe"])
def test_the_checks_can_fail(model_type, mutation, monkeypatch):
    def mutated(*, A, B, **rest):
        A, B = MUTATIONS[mutation](A, B)
        return LowRank(A=A, B=B, **rest)

    monkeypatch.setattr("trl_moe_ext.tuners.moe_lora.layer.LowRank", mutated)
    with pytest.raises(checks.CheckError, match="output: relative error"):
        checks.reference(model_type)
    with pytest.raises(checks.CheckError, match="output with merged weights"):
        checks.merge(model_type)
    if mutation != "with A of the wrong scale":  # by less than bfloat16's own rounding
        with pytest.raises(checks.CheckError, match="of one layer in bfloat16"):
            checks.bfloat16(model_type)


def test_a_gradient_that_is_lost_is_found(monkeypatch):
    """A router that its block reads instead of calling it, as with PEFT's own layer, would never be trained."""
    monkeypatch.setattr(
        "trl_moe_ext.tuners.moe_lora.router.MoeLoraRouter.weight",
        property(lambda self: self.get_base_layer().weight),
    )
    with pytest.raises(checks.CheckError):
        checks.reference("longcat_flash")


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "gpt_oss", "nemotron_h", "aria_text", "muse_spark_text", "gemma4_text"]
)
def test_equals_stock_peft_with_the_same_factors(model_type):
    """PEFT's `target_parameters` builds every merged weight; the mathematics is the same."""
    model = get_peft_model(build(model_type), MoeLoraConfig(r=3, lora_alpha=5, moe_target=["experts"])).eval()
    randomise_factors(model)
    names = {p.name for m in model.modules() if isinstance(m, MoeLoraExperts) for p in m.layout.projections}
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=[], target_parameters=[f"experts.{name}" for name in sorted(names)]
    )
    stock = get_peft_model(build(model_type), config).eval()
    copy_factors(model, stock)
    batch = inputs(model_type)
    with torch.no_grad():
        assert_output_close(census.output(model, batch), census.output(stock, batch), torch.float32)


def copy_factors(model: nn.Module, stock: nn.Module) -> None:
    """Into PEFT's flat layout: A with the expert slowest, B with the expert fastest."""
    ours = {name: m for name, m in model.named_modules() if isinstance(m, MoeLoraExperts)}
    wrappers = [m for m in stock.modules() if type(m).__name__ == "ParamWrapper"]
    assert len(wrappers) == 2 * len(ours)
    names = {id(m): name for name, m in stock.named_modules()}
    for wrapper in wrappers:
        layer = ours[names[id(wrapper)].removesuffix(".base_layer")]
        A = getattr(layer.lora_A["default"], wrapper.parameter_name).data
        B = getattr(layer.lora_B["default"], wrapper.parameter_name).data
        assert A.shape[0] != A.shape[1], "E must differ from r, or a swapped order would pass"
        wrapper.lora_A["default"].weight.data = A.reshape(-1, A.shape[2]).clone()
        wrapper.lora_B["default"].weight.data = B.permute(1, 2, 0).reshape(B.shape[1], -1).clone()


RELOAD = """
import json, sys, torch, transformers, warnings
from peft import PeftModel
from trl_moe_ext.experts import census
for model_type in json.loads(sys.argv[2]):
    expected = torch.load(f"{sys.argv[1]}/{model_type}.pt")
    model = PeftModel.from_pretrained(census.build(model_type), f"{sys.argv[1]}/{model_type}").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        found = census.output(model, census.inputs(model.get_base_model()))
    assert torch.equal(found, expected), model_type
    print(model_type)
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_output_to_the_last_bit(tmp_path):
    types = [model_type for model_type in (*FAMILIES, *COMPOSITES) if model_type not in WITHOUT_FORWARD]
    for model_type in types:
        model = get_peft_model(build(model_type), MoeLoraConfig(r=3, moe_target=checks.WORDS)).eval()
        randomise_factors(model)
        model.save_pretrained(tmp_path / model_type)
        torch.manual_seed(0)
        with torch.no_grad():
            torch.save(census.output(model, inputs(model_type)), tmp_path / f"{model_type}.pt")
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, tmp_path, json.dumps(types)], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.split() == types, done.stderr[-2000:]
