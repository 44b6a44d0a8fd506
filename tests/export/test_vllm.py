"""vLLM's per-expert layout: what the independent decoder reads is what the live layers would merge."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import trl_moe_ext.export.vllm_tensors
from tests.families import build, randomise_factors
from trl_moe_ext.errors import AdapterFileError, ConfigError
from trl_moe_ext.export.vllm import convert_adapter, export_adapter
from trl_moe_ext.export.vllm_check import verify_export
from trl_moe_ext.export.vllm_decoder import expert_deltas, read_deltas
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts

# The first module of experts as the checkpoints on the hub, or where these stack the experts vLLM, know it; and what
# the three projections are called there.
NAMES = {
    "qwen3_moe": ("model.layers.0.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
    "gpt_oss": ("model.layers.0.mlp.experts", ("w1", "w3", "w2")),
    "llama4_text": ("model.layers.0.feed_forward.experts", ("gate_proj", "up_proj", "down_proj")),
    "deepseek_v3": ("model.layers.1.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    "gemma4_text": ("model.layers.0.experts", ("gate_proj", "up_proj", "down_proj")),
}
INTERLEAVED = {"gpt_oss"}
EXPERTS, RANK = 8, 3  # of the tiny models, and another number, so that an exchange of the two shows


@pytest.fixture(autouse=True)
def _hub_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def adapted(model_type: str, **options) -> PeftModel:
    options = {"expert_r": RANK, "expert_alpha": 5, "r": 4} | options
    if model_type == "deepseek_v3":
        options = {"exclude_modules": ["kv_b_proj"]} | options
    model = get_peft_model(build(model_type), MoeLoraConfig(**options))
    randomise_factors(model)
    return model


def merged_deltas(model: PeftModel) -> list[dict[str, torch.Tensor]]:
    """What the tuner merges into each module of experts: gate, up and down ``(E, out, in)``."""
    found = []
    for layer in model.modules():
        if isinstance(layer, MoeLoraExperts):
            deltas = [delta for _, delta in layer._deltas("default")]
            gate_up, down = torch.stack(deltas[:EXPERTS]), torch.stack(deltas[EXPERTS:])
            if model.config.model_type in INTERLEAVED:
                gate, up = gate_up[:, ::2], gate_up[:, 1::2]
            else:
                gate, up = gate_up.chunk(2, dim=1)
            found.append({"gate": gate, "up": up, "down": down})
    return found


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for part in expected:
        torch.testing.assert_close(found[part], expected[part], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_type", NAMES)
def test_the_decoder_reads_what_the_layers_would_merge(model_type, tmp_path):
    model = adapted(model_type)
    writer = export_adapter(model, tmp_path / "adapter")
    found, expected = expert_deltas(tmp_path / "adapter"), merged_deltas(model)
    assert len(found) == len(expected)
    for deltas, merged in zip(found.values(), expected):
        assert_same(deltas, merged)
    assert writer.rank == 4
    assert writer.has_experts

    path, (gate, up, down) = NAMES[model_type]
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in (gate, up, down):
        assert keys[f"base_model.model.{path}.{EXPERTS - 1}.{name}.lora_A.weight"].shape[0] == RANK
        assert keys[f"base_model.model.{path}.{EXPERTS - 1}.{name}.lora_B.weight"].shape[1] == RANK


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_the_comparison_can_fail(model_type, tmp_path):
    """Experts in another order, gate and up exchanged, halves for alternating rows: none of it passes."""
    model = adapted(model_type)
    export_adapter(model, tmp_path)
    found, expected = next(iter(expert_deltas(tmp_path).values())), merged_deltas(model)[0]
    wrong = [
        found | {"down": found["down"].flip(0)},
        found | {"gate": found["up"], "up": found["gate"]},
        found | dict(zip(("gate", "up"), torch.stack([found["gate"], found["up"]], 2).flatten(1, 2).chunk(2, 1))),
    ]
    for deltas in wrong:
        with pytest.raises(AssertionError):
            assert_same(deltas, expected)


def test_linears_keep_their_own_scaling(tmp_path):
    model = adapted("qwen3_moe", lora_alpha=7, use_rslora=True)
    export_adapter(model, tmp_path)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    delta = read_deltas(tmp_path)["model.layers.0.self_attn.q_proj"]
    torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-7)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["lora_alpha"] / config["r"] == pytest.approx(5 / RANK**0.5)


def test_a_router_that_is_no_linear_passes_through(tmp_path):
    model = adapted("gpt_oss", router_mode="lora")
    export_adapter(model, tmp_path)
    router = model.get_base_model().model.layers[0].mlp.router
    delta = read_deltas(tmp_path)["model.layers.0.mlp.router"]
    torch.testing.assert_close(delta, router.get_delta_weight("default"), rtol=1e-5, atol=1e-7)


def test_a_projection_that_is_not_adapted_changes_nothing(tmp_path):
    model = adapted("qwen3_moe", expert_projections="down")
    export_adapter(model, tmp_path)
    deltas = next(iter(expert_deltas(tmp_path).values()))
    assert not deltas["gate"].any()
    assert not deltas["up"].any()
    assert deltas["down"].any()
    assert deltas["gate"].shape == deltas["down"].mT.shape


def test_a_saved_adapter_gives_the_same_files_as_the_live_one(tmp_path):
    model = adapted("mixtral")
    model.get_base_model().save_pretrained(tmp_path / "base")  # for its config
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "saved"))
    export_adapter(model, tmp_path / "live")
    convert_adapter(tmp_path / "saved", tmp_path / "converted")
    live, converted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("live", "converted"))
    assert live.keys() == converted.keys()
    assert all(torch.equal(live[key], converted[key]) for key in live)
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("live", "converted")]
    assert configs[0] == configs[1]
    assert sorted(path.name for path in (tmp_path / "live").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"router_mode": "full"}, r"mlp\.gate\..*router_mode='full'"),
        ({"router_bias": True}, r"lora_router_bias\.bias \(router_bias=True"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the output layer lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on an embedding"),
    ],
)
def test_what_the_layout_has_no_place_for_is_refused_by_name(options, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        export_adapter(adapted("qwen3_moe", **options), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_options_of_a_plain_lora_are_refused_too(options, named, tmp_path):
    model = get_peft_model(build("qwen2_moe"), LoraConfig(**{"target_modules": ["q_proj"]} | options))
    with pytest.raises(ConfigError, match=named):
        export_adapter(model, tmp_path)


def test_latent_attention_is_warned_of(tmp_path):
    model = adapted("deepseek_v3", exclude_modules=None)
    with pytest.warns(UserWarning, match="kv_b_proj into exclude_modules"):
        export_adapter(model, tmp_path)


def test_a_diverged_adapter_is_not_written(tmp_path):
    model = adapted("qwen3_moe")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(AdapterFileError, match="NaN or infinite"):
        export_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_decoder_refuses_half_a_pair_and_a_missing_expert(tmp_path):
    export_adapter(adapted("qwen3_moe"), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    last = f"mlp.experts.{EXPERTS - 2}.up_proj."
    save_file({key: tensor for key, tensor in tensors.items() if f"{last}lora_A" not in key}, file)
    with pytest.raises(AdapterFileError, match=r"6\.up_proj should have lora_A .* found {'B'"):
        read_deltas(tmp_path)
    save_file({key: tensor for key, tensor in tensors.items() if last not in key}, file)
    with pytest.raises(AdapterFileError, match="not every expert of 0 to 7"):
        expert_deltas(tmp_path)


@pytest.mark.parametrize(
    "config",
    [IA3Config(target_modules=["q_proj"], feedforward_modules=[]), OFTConfig(target_modules=["q_proj"])],
    ids=["ia3", "oft"],
)
def test_an_adapter_that_is_no_lora_is_refused_by_its_kind(config, tmp_path):
    with pytest.raises(ConfigError, match=f"an adapter of {type(config).__name__}"):
        export_adapter(get_peft_model(build("qwen2_moe"), config), tmp_path)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_what_was_written_is_compared_with_the_model(model_type, tmp_path):
    model = adapted(model_type)
    export_adapter(model, tmp_path)
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    good = load_file(weights)
    path, (gate, up, down) = NAMES[model_type]

    def name(key: str) -> str:
        return f"base_model.model.{path}.{key}.weight"

    wrong = {
        f"2.{down}.lora_A": f"3.{down}.lora_A",  # of another expert
        f"2.{gate}.lora_B": f"2.{up}.lora_B",  # of the other half
    }
    for key, other in wrong.items():
        save_file(good | {name(key): good[name(other)].clone()}, weights)
        with pytest.raises(AdapterFileError, match=r"2\..* as the model's adapter does"):
            verify_export(tmp_path, model)
    save_file({key: tensor for key, tensor in good.items() if f".7.{up}." not in key}, weights)
    with pytest.raises(AdapterFileError, match=rf"nothing for .*\.7\.{up}"):
        verify_export(tmp_path, model)

    save_file(good, weights)
    verify_export(tmp_path, model)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1.0}))
    with pytest.raises(AdapterFileError, match="the largest difference"):
        verify_export(tmp_path, model)


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "live"])
def test_a_wrong_export_can_not_be_loaded(saved, tmp_path, monkeypatch):
    """A writer that forgets how the scalings of two layers differ."""
    model = adapted("mixtral")
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "saved"))
    monkeypatch.setattr(trl_moe_ext.export.vllm_tensors, "_scaled", lambda B, factor: B.contiguous())

    def export(**options: bool) -> None:
        if saved:
            convert_adapter(tmp_path / "saved", tmp_path / "wrong", **options)
        else:
            export_adapter(model, tmp_path / "wrong", **options)

    with pytest.raises(AdapterFileError, match="the largest difference"):
        export()
    assert not (tmp_path / "wrong" / "adapter_config.json").exists()
    export(verify=False)
    assert (tmp_path / "wrong" / "adapter_config.json").exists()
