"""A module of experts is read from its flags, by a plug-in's record, or by names and shapes; never misread."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.experts.stacked import EXPERTS, HIDDEN, READABLE, UNREADABLE, Clamped, StackedExperts, UpBeforeGate
from tests.tolerances import assert_output_close
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.experts.census import build
from trl_moe_ext.experts.reading import read_layout
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts


def adapted(experts: nn.Module) -> MoeLoraExperts:
    return MoeLoraExperts(experts, "default", MoeLoraConfig(r=2), r=2, lora_alpha=2)


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(9, EXPERTS, generator=generator).topk(2).indices
    return torch.randn(9, HIDDEN, generator=generator), index, torch.rand(9, 2, generator=generator)


@pytest.mark.parametrize("experts", READABLE, ids=lambda c: c.__name__)
def test_experts_without_flags_are_read_from_names_and_shapes(experts):
    module = experts()
    arguments = routing()
    expected = module(*arguments)
    layer = adapted(module)
    assert layer.layout.is_inferred
    assert [p.name for p in layer.layout.projections] == list(experts.shapes)
    assert_output_close(layer(*arguments), expected, torch.float32)


@pytest.mark.parametrize("experts", READABLE, ids=lambda c: c.__name__)
def test_merging_puts_the_update_where_the_family_keeps_the_weight(experts):
    layer = adapted(experts())
    for parameter in layer.lora_B.parameters():
        nn.init.normal_(parameter)
    expected = layer(*routing())
    layer.merge()
    assert_output_close(layer.get_base_layer()(*routing()), expected, torch.float32)


@pytest.mark.parametrize("experts", [UpBeforeGate, Clamped], ids=lambda c: c.__name__)
def test_experts_that_only_look_readable_are_refused(experts):
    with pytest.raises(LayoutError, match=r"looks like a module .* gives another result. Describe"):
        adapted(experts())


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_comparison_that_shows_nothing_is_a_refusal(value):
    experts = UpBeforeGate()
    nn.init.constant_(experts.down_proj, value)
    with pytest.raises(LayoutError, match="gives another result"):
        adapted(experts)


def test_experts_that_cannot_be_called_as_their_signature_says_are_refused(monkeypatch):
    monkeypatch.setattr(StackedExperts, "one", lambda self, expert, x: x[:, :3])
    with pytest.raises(LayoutError, match="looks like a module of stacked experts, but calling it fails: "):
        adapted(StackedExperts())


def test_the_comparison_leaves_the_module_as_it_was():
    module = StackedExperts().train()
    module.act_fn.eval()
    module.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    adapted(module)
    assert (module.training, module.act_fn.training) == (True, False)


@pytest.mark.parametrize("experts", UNREADABLE, ids=lambda c: c.__name__)
def test_experts_with_more_than_stacks_are_not_read_but_seen(experts):
    block = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": experts()})])})
    assert read_layout(block["layers"][0]["experts"]) is None
    assert read_anatomy(block.named_modules()).unread_experts == ["layers.0.experts"]


def test_a_router_is_no_module_of_experts():
    class ExpertsRouter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    block = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"router": ExpertsRouter()})])})
    assert read_anatomy(block.named_modules()).unread_experts == []


def test_an_adapted_module_refuses_what_it_does_not_know():
    with pytest.raises(LayoutError, match=r"called with \['scale'\] besides hidden_states, top_k_index"):
        adapted(StackedExperts())(*routing(), scale=3.0)


def test_an_adapted_module_takes_keywords():
    hidden, index, weights = routing()
    layer = adapted(StackedExperts())
    assert torch.equal(layer(hidden_states=hidden, top_k_index=index, top_k_weights=weights), layer(*routing()))


def test_a_module_that_is_not_called_with_routing_is_not_read():
    class Dense(StackedExperts):
        def forward(self, x):
            return x

    assert read_layout(Dense()) is None


def layout_of(model_type):
    experts = read_anatomy(build(model_type).named_modules()).experts
    return next(iter(experts.values()))


def test_llama4_is_weighted_on_the_input_side_in_a_block_of_its_own():
    layout = layout_of("llama4_text")
    assert layout.weights_on_input
    assert layout.sparse_block.__name__ == "SparseLlama4TextMoe"
    assert all(projection.is_transposed for projection in layout.projections)


def test_dbrx_keeps_three_matrices_of_all_experts():
    layout = layout_of("dbrx")
    assert [(p.role, p.parameter, p.is_transposed) for p in layout.projections] == [
        ("gate", "mlp.w1", False),
        ("up", "mlp.v1", False),
        ("down", "mlp.w2", True),
    ]


def test_jetmoe_has_experts_of_attention_too_called_with_rows():
    experts = read_anatomy(build("jetmoe").named_modules()).experts
    names = {name.split(".", 3)[3] for name in experts}
    attention, mlp = "self_attention.experts", "mlp"
    assert names == {f"{part}.{side}_linear" for part in (attention, mlp) for side in ("input", "output")}
    assert all(layout.takes_rows for layout in experts.values())


def test_longcat_flash_has_identity_experts_behind_the_others():
    layout = layout_of("longcat_flash")
    assert layout.identity_experts > 0
    assert layout.num_experts + layout.identity_experts == layout_rows("longcat_flash")


def layout_rows(model_type):
    return next(m for m in build(model_type).modules() if hasattr(m, "zero_expert_num")).gate_up_proj.shape[0]


def test_step3p5_needs_no_record():
    assert layout_of("step3p5").is_inferred


@pytest.mark.parametrize("model_type", ["switch_transformers", "nllb-moe", "vitpose_backbone"])
def test_experts_that_are_modules_of_their_own_are_linears(model_type):
    model = build(model_type)
    anatomy = read_anatomy(model.named_modules())
    assert not anatomy.experts
    assert not anatomy.unread_experts
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in anatomy.expert_linears)
    assert all(name.startswith(container + ".") for name, container in anatomy.expert_linears.items())


def test_the_product_keys_of_doge_lead_to_embeddings():
    anatomy = read_anatomy(build("doge").named_modules())
    assert {name.rpartition(".")[2] for name in anatomy.expert_linears} == {"down_embed", "up_embed"}
    assert {name.rpartition(".")[2] for name in anatomy.shared_experts} == {"gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in anatomy.router} == {"router_gate"}


def test_the_experts_of_another_modality_are_set_apart():
    anatomy = read_anatomy(build("ernie4_5_vl_moe_text").named_modules())
    assert anatomy.experts
    assert all("text_moe" in name for name in anatomy.experts)
    assert all("vision_moe" in name for name in anatomy.other_experts)
