"""What MOE_ESFT promises on every MoE family of transformers.

Its yardstick is full fine-tuning: the family's own code in float64, in its eager implementation, with gradients of
whole stacks. It shares nothing with the kernels.
"""

from __future__ import annotations

import pytest

from tests.families import COMPOSITES, FAMILIES
from trl_moe_ext.experts.census import checks
from trl_moe_ext.experts.census.esft_checks import ESFT_CHECKS
from trl_moe_ext.kernels.selected import SelectedExperts
from trl_moe_ext.kernels.trained import ExpertsDeltas
from trl_moe_ext.tuners.moe_esft import MoeEsftExperts

# transformers gives it no forward: its parts, such as qwen3_omni_moe_thinker, are types of their own.
WITHOUT_FORWARD = {"qwen3_omni_moe"}


@pytest.mark.parametrize("check", ESFT_CHECKS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_family(model_type, check):
    ESFT_CHECKS[check](model_type)


@pytest.mark.slow
@pytest.mark.parametrize("check", ESFT_CHECKS)
@pytest.mark.parametrize("model_type", sorted({*COMPOSITES} - WITHOUT_FORWARD))
def test_composite(model_type, check):
    ESFT_CHECKS[check](model_type)


def shifted(selected: SelectedExperts) -> SelectedExperts:
    """Each expert's neighbour in its place."""
    experts = sorted((expert + 1) % selected.num_experts for expert in selected.experts)
    return SelectedExperts(tuple(experts), selected.num_experts)


MUTATIONS = {
    "without the deltas": lambda d: d._replace(**{n: x * 0 for n, x in d._asdict().items() if n in ("up", "down")}),
    "with another selection": lambda d: d._replace(selected=shifted(d.selected)),
    "with deltas of the wrong scale": lambda d: d._replace(down=None if d.down is None else d.down * 1.01),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_the_checks_can_fail(model_type, mutation, monkeypatch):
    stock = MoeEsftExperts._sum

    def mutated(self, adapters: list[str]) -> ExpertsDeltas:
        return MUTATIONS[mutation](stock(self, adapters))

    monkeypatch.setattr(MoeEsftExperts, "_sum", mutated)
    with pytest.raises(checks.CheckError, match="output: relative error"):
        ESFT_CHECKS["reference"](model_type)
    with pytest.raises(checks.CheckError, match="output with merged weights"):
        ESFT_CHECKS["merge"](model_type)
    if mutation != "with deltas of the wrong scale":  # by less than bfloat16's own rounding
        with pytest.raises(checks.CheckError, match="of one layer in bfloat16"):
            ESFT_CHECKS["bfloat16"](model_type)


def test_a_lost_gradient_is_found(monkeypatch):
    """Of deltas that are added without autograd, the output would be right."""
    stock = MoeEsftExperts._sum

    def detached(self, adapters: list[str]) -> ExpertsDeltas:
        deltas = stock(self, adapters)
        return deltas._replace(up=deltas.up.detach())

    monkeypatch.setattr(MoeEsftExperts, "_sum", detached)
    with pytest.raises(checks.CheckError, match=r"gradient of .*gate_up_proj: relative error 1"):
        ESFT_CHECKS["reference"]("qwen3_moe")
