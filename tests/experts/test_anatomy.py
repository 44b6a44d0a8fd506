"""Parts of a model are told by structure: attention, shared experts, dense MLPs and routers of any family."""

from __future__ import annotations

import pytest
from torch import nn

from tests.families import FAMILIES, build
from trl_moe_ext.experts.anatomy import read_anatomy


def anatomy_of(model):
    return read_anatomy(model.named_modules())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_linear_of_a_layer_has_at_most_one_part_and_every_moe_has_a_router(model_type):
    model = build(model_type)
    anatomy = anatomy_of(model)
    linears = [*anatomy.attention, *anatomy.shared_experts, *anatomy.dense_mlp, *anatomy.router]
    assert len(linears) == len(set(linears))
    assert not anatomy.unread_experts
    routers = [*anatomy.router, *anatomy.parameters["router"]]
    for block in {name.rpartition(".")[0] for name in (*anatomy.experts, *anatomy.expert_linears.values())}:
        if model_type != "vitpose_backbone":  # the data set, and not a router, chooses the expert there
            assert any(name.startswith(f"{block}.") for name in routers), block


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.indexer = nn.ModuleDict({"wq": nn.Linear(4, 4)})


def layer(mlp):
    return nn.ModuleDict({"self_attn": Attention(), "mlp": mlp})


def test_the_tower_of_another_modality_is_left_alone():
    dense = nn.ModuleDict({"gate_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)})
    towers = nn.ModuleDict(
        {name: nn.ModuleDict({"layers": nn.ModuleList([layer(dense)])}) for name in ("language_model", "vision_tower")}
    )
    anatomy = anatomy_of(towers)
    assert anatomy.attention == ["language_model.layers.0.self_attn.q_proj"]
    assert all(name.startswith("language_model") for name in anatomy.dense_mlp)


def test_what_no_gradient_reaches_is_left_alone():
    """An indexer's scores only choose positions."""
    anatomy = anatomy_of(nn.ModuleDict({"layers": nn.ModuleList([layer(nn.ModuleDict())])}))
    assert anatomy.attention == ["layers.0.self_attn.q_proj"]


def test_the_gate_of_a_shared_expert_is_not_one_of_its_projections():
    anatomy = anatomy_of(build("qwen2_moe"))
    assert {name.rpartition(".")[2] for name in anatomy.shared_experts} == {"gate_proj", "up_proj", "down_proj"}
