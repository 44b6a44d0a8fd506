"""What is told of a model is what the model is, and what is counted is what an adapter trains."""

from __future__ import annotations

import warnings

import pytest
from peft import get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig

from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.experts.anatomy import read_anatomy
from trl_moe_ext.experts.census import build, discover
from trl_moe_ext.experts.census.tiny import skeleton
from trl_moe_ext.reporting.inspection import Inspection, inspect_model
from trl_moe_ext.reporting.inspection.experts import RoutedExperts, routed_experts
from trl_moe_ext.reporting.inspection.layer_ranges import ranges
from trl_moe_ext.reporting.inspection.router import RouterKind
from trl_moe_ext.tuners.targets.options import TARGET_WORDS

# One of every form that experts, routers and attention have, a dense model and composites.
FAMILIES = [
    "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "dbrx", "jetmoe", "longcat_flash", "switch_transformers", "doge",
    "gemma4_text", "nemotron_h", "step3p5", "dots3_note", "diffusion_gemma", "qwen3_vl_moe", "llama",
]  # fmt: skip


def inspected(model_type: str, **kwargs: int) -> Inspection:
    return inspect_model(skeleton(model_type), **kwargs)


def experts_of(model_type: str) -> RoutedExperts:
    [experts] = inspected(model_type).experts
    return experts


# -- the adapters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_counts_are_those_of_a_real_adapter(model_type: str) -> None:
    sizes = inspected(model_type, r=3, expert_r=_expert_r(model_type)).adapters
    assert [size.moe_target for size in sizes] == [*([word] for word in TARGET_WORDS), ["experts", "attention"]]
    for size in sizes:
        assert (size.modules, size.parameters, size.share) == real_adapter(model_type, size.moe_target)
        assert size.bytes_fp32 == 4 * size.parameters


def _expert_r(model_type: str) -> int | None:
    return None if model_type == "llama" else 2  # on a dense model it has no effect, which is an error


def real_adapter(model_type: str, moe_target: list[str]) -> tuple[int, int, float]:
    """Adapted modules, trainable parameters and their share, of a model with weights; zeros if nothing is adapted."""
    expert_r = _expert_r(model_type) if "experts" in moe_target else None
    config = MoeLoraConfig(moe_target=moe_target, r=3, expert_r=expert_r)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = get_peft_model(build(model_type), config)
    except ConfigError as error:
        if not str(error).startswith("nothing to adapt"):
            raise
        return 0, 0, 0.0
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    modules = {name.partition(".lora_")[0] for name in trained}
    parameters = sum(trained.values())
    return len(modules), parameters, parameters / sum(p.numel() for p in model.parameters())


def test_the_model_is_left_as_it_was() -> None:
    model = skeleton("llama4")
    before = [(name, type(module)) for name, module in model.named_modules()]
    names = [name for name, _ in model.named_parameters()]
    first = inspect_model(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == before
    assert [name for name, _ in model.named_parameters()] == names
    assert inspect_model(model) == first


# -- the routed experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != "llama"])
def test_nothing_about_the_experts_is_left_out(model_type: str) -> None:
    check_experts(model_type)


@pytest.mark.slow
def test_nothing_about_the_experts_of_any_family_of_transformers_is_left_out() -> None:
    for model_type in (*discover().own, *discover().composite):
        check_experts(model_type)


def check_experts(model_type: str) -> None:
    """Every module of experts is told, with how many there are, how many are chosen, and by what router."""
    modules = dict(skeleton(model_type).named_modules())
    anatomy = read_anatomy((name, module) for name, module in modules.items() if name)
    found = routed_experts(modules, anatomy)
    holders = {*anatomy.experts, *anatomy.other_experts, *anatomy.expert_linears.values()}
    assert sum(len(each.layers) * len(each.modules) for each in found) == len(holders), model_type
    # In vitpose the data set that an image is from chooses the experts.
    is_routed = not model_type.startswith("vitpose")
    for each in found:
        assert each.num_experts, model_type
        told = [bool(each.top_k), each.router is not None, each.active_parameters is not None]
        assert told == [is_routed] * 3, model_type


@pytest.mark.parametrize(
    ("model_type", "router"),
    [
        ("qwen3_moe", RouterKind("Qwen3MoeTopKRouter", "softmax", False)),
        ("qwen2_moe", RouterKind("Qwen2MoeTopKRouter", "softmax", False)),  # its shared expert's gate is a sigmoid
        ("deepseek_v3", RouterKind("DeepseekV3TopkRouter", "sigmoid", True)),
        ("llama4_text", RouterKind("Llama4Router", "sigmoid", False)),
        ("longcat_flash", RouterKind("LongcatFlashTopkRouter", "softmax", True)),
        ("gpt_oss", RouterKind("GptOssTopKRouter", "softmax", False)),  # a bias, but one that is trained
        ("afmoe", RouterKind("AfmoeTokenChoiceRouter", "sigmoid", True)),
        ("dbrx", RouterKind("DbrxRouter", "softmax", False)),  # in the block
        ("laguna", RouterKind("LagunaTopKRouter", "sigmoid", True)),  # softmax in a comment
        ("phimoe", RouterKind("PhimoeTopKRouter", "unknown", False)),  # a function of its own
        ("doge", RouterKind("Linear", "softmax", False)),
    ],
)
def test_the_kind_of_the_router(model_type: str, router: RouterKind) -> None:
    assert experts_of(model_type).router == router


@pytest.mark.parametrize(("option", "scoring"), [("softmax", "softmax"), ("sigmoid", "sigmoid")])
def test_where_the_code_knows_both_the_option_decides(option: str, scoring: str) -> None:
    [experts] = inspect_model(skeleton("cohere2_moe", expert_selection_fn=option)).experts
    assert experts.router == RouterKind("Cohere2MoeTopKRouter", scoring, False)


def test_an_option_that_the_code_does_not_heed_decides_nothing() -> None:
    [experts] = inspect_model(skeleton("qwen3_moe", scoring_func="sigmoid")).experts
    assert experts.router is not None
    assert experts.router.scoring == "softmax"


@pytest.mark.parametrize(
    ("model_type", "layout", "read_from"),
    [
        ("qwen3_moe", ["gate and up in one stack, in two halves"], "transformers' experts interface"),
        (
            "gpt_oss",
            ["gate and up in one stack, interleaved", "transposed, (experts, in, out)", "biases"],
            "transformers' experts interface",
        ),
        ("nemotron_h", ["up and down, no gate"], "transformers' experts interface"),
        (
            "llama4_text",
            [
                "gate and up in one stack, in two halves",
                "transposed, (experts, in, out)",
                "routing weights multiply the input",
                "stock computes every expert for every token, moe_lora only the chosen",
            ],
            "record llama4",
        ),
        (
            "dbrx",
            ["gate, up and down apart", "one matrix a projection, an expert below the other", "transposed: w2"],
            "record dbrx",
        ),
        ("longcat_flash", ["gate and up in one stack, in two halves", "2 identity experts"], "record longcat_flash"),
        ("doge", ["Embeddings of their own: ordinary LoRA"], "record doge"),
        (
            "step3p5",
            ["gate and up in one stack, in two halves"],
            "names and shapes; compared with the module itself when an adapter is attached",
        ),
    ],
)
def test_the_layout_in_words(model_type: str, layout: list[str], read_from: str) -> None:
    experts = experts_of(model_type)
    assert (experts.layout, experts.read_from) == (layout, read_from)


def test_experts_of_attention_are_a_block_of_their_own() -> None:
    mlp, attention = inspected("jetmoe").experts
    assert mlp.modules == ["mlp.input_linear", "mlp.output_linear"]
    assert attention.modules == ["self_attention.experts.input_linear", "self_attention.experts.output_linear"]
    assert mlp.layout == ["single projections, called with rows sorted by expert"]


def test_encoder_and_decoder_are_told_apart() -> None:
    encoder, decoder = inspected("switch_transformers").experts
    assert (encoder.stack, decoder.stack) == ("encoder.block", "decoder.block")
    assert encoder.layout == ["Linears of their own: ordinary LoRA"]
    assert encoder.top_k == [1]


def test_layers_with_experts() -> None:
    config = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    model = skeleton("qwen3_moe", **config)
    [experts] = inspect_model(model).experts
    assert (experts.stack, experts.stack_layers, experts.layers) == ("model.layers", 6, [1, 5])


def test_layers_with_different_numbers_of_experts() -> None:
    text, vision = inspected("dots3_note").experts
    assert (text.num_experts, text.other_modality) == ([8], False)
    assert (vision.num_experts, vision.other_modality) == ([4, 8], True)


def test_layers_with_different_routers_are_told_apart() -> None:
    routers = [experts.router for experts in inspected("deepseek_v4").experts]
    assert [router and router.class_name for router in routers] == ["DeepseekV4HashRouter", "DeepseekV4TopKRouter"]
    assert [router and router.scoring for router in routers] == ["sqrtsoftplus", "sqrtsoftplus"]


@pytest.mark.parametrize(
    ("model_type", "shared"),
    [
        ("qwen3_moe", []),
        ("qwen2_moe", ["mlp.shared_expert"]),
        ("deepseek_v3", ["mlp.shared_experts"]),
        ("granitemoehybrid", ["shared_mlp"]),
        ("doge", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    ],
)
def test_shared_experts(model_type: str, shared: list[str]) -> None:
    assert experts_of(model_type).shared_experts == shared


# -- the model -------------------------------------------------------------------------------------------------------


def test_parameters_that_one_token_runs_through() -> None:
    """The published numbers of Qwen3-30B-A3B: 30.5B, of which 29.9B are no embeddings, and 3.3B active."""
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    inspection = inspect_model(model_of(config))
    expert = 3 * 2048 * 768
    assert inspection.routed_expert_parameters == 48 * 128 * expert
    assert inspection.active_parameters == inspection.parameters - 48 * (128 - 8) * expert
    assert round(inspection.parameters / 1e9, 1) == 30.5
    assert not inspection.is_active_at_most


def model_of(config: Qwen3MoeConfig) -> nn.Module:
    from trl_moe_ext.cli.build_model import build_on_meta

    return build_on_meta(config)


def test_identity_experts_make_the_active_parameters_a_limit() -> None:
    inspection = inspected("longcat_flash")
    assert inspection.is_active_at_most
    assert inspection.experts[0].identity_experts == 2


def test_tied_experts_count_once() -> None:
    tied = inspected("diffusion_gemma")
    assert len(tied.experts) == 2
    assert tied.routed_expert_parameters == max(each.parameters for each in tied.experts) > 0


def test_a_dense_model_has_no_experts_and_all_of_it_is_active() -> None:
    inspection = inspected("llama")
    assert not inspection.has_routed_experts
    assert inspection.experts == []
    assert inspection.active_parameters == inspection.parameters
    assert inspection.layers == {"model.layers": 2}


@pytest.mark.parametrize(
    ("model_type", "text", "other"),
    [
        ("qwen3_vl_moe", ["model.language_model"], ["model.visual"]),
        ("llama4", ["language_model"], ["vision_model"]),
        ("qwen3_moe", [], []),
    ],
)
def test_the_parts_of_a_composite(model_type: str, text: list[str], other: list[str]) -> None:
    inspection = inspected(model_type)
    assert [part.name for part in inspection.text_models] == text
    assert [part.name for part in inspection.other_models] == other
    assert inspection.active_parameters is not None
    towers = sum(part.parameters for part in inspection.other_models)
    inactive = sum(e.parameters - (e.active_parameters or 0) for e in inspection.experts)
    assert inspection.active_parameters == inspection.parameters - towers - inactive


def test_experts_for_tokens_of_another_modality_are_told_as_such() -> None:
    text, vision = inspected("ernie4_5_vl_moe").experts
    assert (text.modules, text.other_modality) == (["mlp.text_moe.experts"], False)
    assert (vision.modules, vision.other_modality) == (["mlp.vision_moe.experts"], True)


# -- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([], ""),
        ([4], "4"),
        ([2, 3, 4], "2-4"),
        ([1, 3], "1, 3"),
        ([1, 3, 5, 7], "1, 3, ..., 7"),
        ([0, 2, 3, 4, 9], "0, 2-4, 9"),
    ],
)
def test_layers_in_short(indices: list[int], text: str) -> None:
    assert ranges(indices) == text
