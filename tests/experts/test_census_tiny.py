"""Tiny models of every MoE type: found without a list, built from the config class, random and reproducible."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_outputs import CausalLMOutput

from trl_moe_ext.errors import ConfigError, MoeExtError
from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.experts.census import build, discover, inputs, output, tiny_config
from trl_moe_ext.experts.census.layer_plan import plan_layers

WELL_KNOWN = {"mixtral", "qwen3_moe", "qwen3_next", "deepseek_v3", "gpt_oss", "gemma4_text", "llama4_text", "glm4_moe"}
UNUSUAL = {"dbrx", "mistral4", "nemotron_h", "qwen3_omni_moe_talker_text", "switch_transformers", "vitpose_backbone"}
COMPOSITES = {"gemma4", "llama4", "qwen3_vl_moe", "glm4v_moe", "kimi_k25", "mistral3", "qwen3_omni_moe_thinker"}
DENSE = {"llama", "mistral", "qwen3_5_text", "gemma4_vision", "gemma4_unified_text"}
VARIED = ["mixtral", "gpt_oss", "deepseek_v4", "nemotron_h", "nllb-moe", "dots3_note_vision_encoder", "mistral3"]


class DayZeroConfig(PreTrainedConfig):
    """A family that no one has heard of, with names of its own for its sizes."""

    model_type = "day_zero"
    vocab_size: int = 60_000
    hidden_size: int = 5120
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 40
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    mlp_layer_types: list[str] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["dense"] * 3 + ["sparse"] * (self.num_hidden_layers - 3)
        super().__post_init__(**kwargs)


@use_experts_implementation
class DayZeroExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        experts, inner = config.n_routed_experts, config.moe_intermediate_size
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, config.hidden_size, inner))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        result = torch.zeros_like(hidden_states)
        for token, (experts, weights) in enumerate(zip(top_k_index, top_k_weights)):
            for expert, weight in zip(experts, weights):
                gate, up = (self.gate_up_proj[expert] @ hidden_states[token]).chunk(2)
                result[token] += weight * (self.down_proj[expert] @ (self.act_fn(gate) * up))
        return result


class DayZeroLayer(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.n_routed_experts)
        self.experts = DayZeroExperts(config) if kind == "sparse" else None

    def forward(self, hidden_states):
        if self.experts is None:
            return hidden_states
        flat = hidden_states.flatten(0, 1)
        top_k_weights, top_k_index = self.gate(flat).softmax(-1).topk(self.top_k)
        return hidden_states + self.experts(flat, top_k_index, top_k_weights).view_as(hidden_states)


class DayZeroForCausalLM(PreTrainedModel):
    config_class = DayZeroConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DayZeroLayer(config, kind) for kind in config.mlp_layer_types)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        hidden_states = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return CausalLMOutput(logits=self.lm_head(hidden_states))


@pytest.fixture(scope="module")
def day_zero():
    """Registers the family as its authors would: its config, and no more."""
    AutoConfig.register("day_zero", DayZeroConfig)
    yield "day_zero"
    del CONFIG_MAPPING._extra_content["day_zero"]


@pytest.fixture(scope="module")
def found(day_zero):
    return discover()


def test_well_known_types_are_found(found):
    assert set(found.own) >= WELL_KNOWN | UNUSUAL
    assert set(found.composite) >= COMPOSITES
    assert not set(found.own) & set(found.composite)


def test_dense_types_are_not_found(found):
    assert not DENSE & {*found.own, *found.composite, *found.failed}


def test_what_cannot_be_built_is_told_with_its_reason(found):
    # The only type that mentions experts and whose own default config transformers refuses.
    assert set(found.failed) <= {"gemma4_assistant"}
    assert all(repr(model_type) in reason for model_type, reason in found.failed.items())


def test_a_family_of_today_is_found_and_built(found, day_zero):
    assert day_zero in found.own
    model = build(day_zero)
    assert isinstance(model, DayZeroForCausalLM)
    assert [layer.experts is None for layer in model.layers] == [True, False]
    (layout,) = read_anatomy(model.named_modules()).experts.values()
    assert layout.num_experts == 8
    assert output(model, inputs(model)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_type_runs(found, dtype):
    wrong = {}
    for model_type in (*found.own, *found.composite):
        model = build(model_type, dtype)
        if model_type == "qwen3_omni_moe":  # two models in one, each a type of its own in this census or in the other
            with pytest.raises(MoeExtError, match="thinker, talker"):
                inputs(model)
            continue
        with torch.no_grad():
            result = output(model, inputs(model))
        size = result.float().std().item()
        if not result.isfinite().all() or not 0.02 < size < 3:
            wrong[model_type] = size
    assert wrong == {}


@pytest.mark.parametrize("model_type", VARIED)
def test_models_are_the_same_for_the_same_seed_only(model_type):
    first, again, other = build(model_type), build(model_type), build(model_type, seed=1)
    arguments = inputs(first)
    for name, tensor in inputs(again).items():
        torch.testing.assert_close(tensor, arguments[name], rtol=0, atol=0)
    with torch.no_grad():
        expected = output(first, arguments)
        assert torch.equal(output(again, arguments), expected)
        assert not torch.allclose(output(other, arguments), expected)


@pytest.mark.parametrize("model_type", VARIED)
def test_no_weight_is_constant(model_type):
    state = build(model_type).state_dict()
    floating = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel() > 1}
    assert floating
    assert [name for name, tensor in floating.items() if tensor.std() == 0 or not tensor.isfinite().all()] == []


def test_a_router_that_looks_experts_up_has_a_table():
    tables = [buffer for name, buffer in build("deepseek_v4").named_buffers() if name.endswith("tid2eid")]
    assert tables
    for table in tables:
        assert (table[:, 0] != table[:, 1]).all()
        assert table.unique().tolist() == list(range(8))


def test_building_leaves_the_state_of_torch_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build("mixtral")
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_a_family_keeps_in_float32_stays_so():
    state = build("inkling2_text", torch.bfloat16).state_dict()
    assert state["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    assert state["model.layers.0.mlp.experts.down_proj"].dtype == torch.bfloat16


def test_bfloat16_weights_are_the_float32_ones_rounded():
    exact, rounded = build("gpt_oss").state_dict(), build("gpt_oss", torch.bfloat16).state_dict()
    for name, tensor in exact.items():
        torch.testing.assert_close(rounded[name], tensor.to(rounded[name].dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_type", "lists"),
    [
        ("axk1", {"mlp_layer_types": ["dense", "sparse"]}),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"]}),
        ("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe"]}),
    ],
)
def test_a_tiny_model_keeps_every_kind_of_layer(model_type, lists):
    config = tiny_config(model_type)
    for name, kinds in lists.items():
        assert list(dict.fromkeys(getattr(config, name))) == kinds
        assert len(getattr(config, name)) == config.num_hidden_layers


def test_layers_with_sizes_of_their_own_are_kept_beside_the_usual_ones():
    config = tiny_config("dots3_note_vision_encoder")
    experts = [layer.num_local_experts for layer in config.per_layer_config]
    assert len(experts) == 3
    assert set(experts[1:]) == {4, 8}


def test_the_plan_is_the_fewest_layers():
    plan = plan_layers(DayZeroConfig())
    assert plan.default == 40
    assert plan.kept == (0, 3)
    assert plan.positions([0, 1, 2]) == [0]
    assert plan.positions([7]) == [1]


def test_overrides_reach_nested_configs():
    assert tiny_config("mixtral", num_local_experts=4).num_local_experts == 4
    nested = tiny_config("mistral3", text_config={"model_type": "mixtral", "num_local_experts": 4}).text_config
    assert (nested.model_type, nested.num_local_experts) == ("mixtral", 4)


def test_special_tokens_of_a_composite_agree_and_are_not_drawn():
    model = build("qwen3_omni_moe_thinker")
    special = [getattr(model.config, name) for name in ("image_token_id", "video_token_id", "audio_token_id")]
    assert len(set(special)) == 3
    assert max(special) < model.config.text_config.vocab_size
    assert not torch.isin(inputs(model)["input_ids"], torch.tensor(special)).any()


def test_an_unknown_type_gets_near_matches():
    with pytest.raises(ConfigError, match="did you mean mixtral"):
        tiny_config("mixtrall")


def test_an_error_of_transformers_gets_the_name_of_the_type():
    with pytest.raises(MoeExtError, match=r"'mixtral' cannot be built: .*hidden_size"):
        build("mixtral", hidden_size="wide")
