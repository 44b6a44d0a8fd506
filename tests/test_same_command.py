"""One command trains every kind of model: dense, MoE, types that `AutoModelForCausalLM` lacks, multimodal ones."""

from __future__ import annotations

import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from tests.hosts.processes import run
from tests.tiny_checkpoints import VOCAB_SIZE, byte_tokenizer
from trl_moe_ext import MoeLoraConfig
from trl_moe_ext.experts.census import build, tiny_config
from trl_moe_ext.profiles.choose import by_number
from trl_moe_ext.profiles.measure import measure_profile
from trl_moe_ext.profiles.profile import ExpertProfile
from trl_moe_ext.reporting.adapted import adapted_parts
from trl_moe_ext.tuners.moe_lora import MoeLoraExperts

DATA = Path(__file__).parents[1] / "configs" / "quickstart" / "data"
TRL = str(Path(sys.executable).with_name("trl"))
NO_EXPERTS = "has no routed experts: moe_lora trains ordinary LoRA on its Linears"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint, and the parts of it that an adapter with no more options than a rank trains."""

    name: str
    model_type: str
    parts: tuple[str, ...] = ("routed experts", "attention")
    overrides: Mapping[str, Any] = field(default_factory=dict)
    is_quick: bool = False

    @property
    def is_dense(self) -> bool:
        return "routed experts" not in self.parts


DENSE = ("attention", "dense MLP")
KINDS = (
    Kind("mistral", "mistral", DENSE, is_quick=True),
    Kind("ministral3", "ministral3", DENSE),
    Kind("llama", "llama", DENSE),
    Kind("qwen2", "qwen2", DENSE),
    Kind("mistral3 around mistral", "mistral3", DENSE, {"text_config": {"model_type": "mistral"}}),
    Kind("mistral3 around ministral3", "mistral3", DENSE, {"text_config": {"model_type": "ministral3"}}),
    Kind("gemma4 without experts", "gemma4", DENSE, {"text_config": {"enable_moe_block": False}}),
    Kind("qwen3_moe", "qwen3_moe"),
    Kind("mixtral", "mixtral"),
    Kind("gpt_oss", "gpt_oss"),
    # Its config class is in none of the auto classes of causal language models.
    Kind("mistral4", "mistral4", is_quick=True),
    # Experts that do not follow transformers' interface
    Kind("jetmoe", "jetmoe"),
    Kind("longcat_flash", "longcat_flash"),
    Kind("dbrx", "dbrx"),
    Kind("deepseek_v3", "deepseek_v3"),
    # One layer of Mamba, one of attention, one of experts
    Kind("nemotron_h", "nemotron_h"),
    # TRL asks the next four for what they do not have: a body apart from the model, `num_experts` in the config.
    Kind("llama4_text", "llama4_text"),
    Kind("llama4", "llama4", is_quick=True),
    Kind("phimoe", "phimoe"),
    Kind("glm4v_moe", "glm4v_moe"),
    Kind("gemma4", "gemma4"),
    Kind("qwen3_vl_moe", "qwen3_vl_moe"),
    Kind("mistral3 around mistral4", "mistral3"),
    Kind("kimi_k25", "kimi_k25"),
    Kind("step3p7", "step3p7"),
)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, id=kind.name, marks=() if kind.is_quick else pytest.mark.slow) for kind in KINDS],
)
def test_two_steps(kind: Kind, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "model", tmp_path / "out"
    cls = save(kind, checkpoint)
    with pytest.warns(UserWarning, match=NO_EXPERTS) if kind.is_dense else nullcontext():
        trainer = sft(checkpoint, out)
    assert tuple(row.part for row in adapted_parts(trainer.model) if row.parameters) == kind.parts
    with recorded_experts(trainer.model) as experts:
        trainer.train()
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    check_trained(trainer.model, experts)
    trainer.save_model(str(out))
    check_reload(trainer.model, cls, checkpoint, out, kind)


def save(kind: Kind, directory: Path) -> type[PreTrainedModel]:
    """Save a tiny random checkpoint with a tokenizer, and return its class: what TRL looks up in transformers."""
    overrides = with_vocabulary(tiny_config(kind.model_type, **kind.overrides), kind.overrides)
    model = build(kind.model_type, **overrides)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return type(model)


def with_vocabulary(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`overrides` with room for the tokens of the byte tokenizer, in `config` and in what it nests."""
    found = dict(overrides)
    for name, value in vars(config).items():
        if name.startswith("vocab_size"):
            found[name] = VOCAB_SIZE
        elif isinstance(value, PreTrainedConfig):
            nested = with_vocabulary(value, found.get(name, {}))
            if nested:
                found[name] = {"model_type": value.model_type, **nested}
    return found


def sft(checkpoint: Path, out: Path) -> SFTTrainer:
    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-2,
        max_length=96,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
    )
    return SFTTrainer(
        model=str(checkpoint),
        args=arguments,
        train_dataset=load_dataset(str(DATA), split="train[:16]"),
        # Processors of models that see images need torchvision. Of a processor, texts need only its tokenizer.
        processing_class=byte_tokenizer(),
        peft_config=MoeLoraConfig(r=4),
    )


@contextmanager
def recorded_experts(model: nn.Module) -> Iterator[dict[str, set[int]]]:
    """Name of every module of adapted experts -> the experts that got a token on which the loss depends."""
    experts: dict[str, set[int]] = defaultdict(set)
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, MoeLoraExperts):

            def record(
                layer: MoeLoraExperts, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor, name: str = name
            ) -> None:
                routing = (*args, *kwargs.values())[1]
                index = _expert_of_row(routing) if layer.layout.takes_rows else routing.flatten(0, -2)

                def add(gradient: Tensor) -> None:
                    reached = index[gradient.flatten(0, -2).any(1)].unique().tolist()
                    experts[name] |= {expert for expert in reached if expert < layer.layout.num_experts}

                out.register_hook(add)

            hooks.append(module.register_forward_hook(record, with_kwargs=True))
    yield experts
    for hook in hooks:
        hook.remove()


def _expert_of_row(rows_per_expert: list[int]) -> Tensor:
    return torch.arange(len(rows_per_expert)).repeat_interleave(torch.tensor(rows_per_expert))


def check_trained(model: nn.Module, experts: Mapping[str, set[int]]) -> None:
    """Every factor that starts at zero has moved; of stacks, those of the experts that could learn, and no other."""
    ups = {name: p.detach() for name, p in model.named_parameters() if ".lora_B." in name and p.requires_grad}
    assert ups
    for name, up in ups.items():
        module = name.partition(".lora_B.")[0]
        if module in experts:
            assert {expert for expert, factor in enumerate(up) if factor.any()} == experts[module], name
        else:
            assert up.any(), name


@torch.no_grad()
def check_reload(trained: nn.Module, cls: type[PreTrainedModel], checkpoint: Path, out: Path, kind: Kind) -> None:
    """PEFT and transformers load the adapter to the same logits, which are not those of the checkpoint."""
    tokens = torch.randint(3, 97, (2, 12))
    expected = trained.eval()(input_ids=tokens).logits
    # Before the adapter is attached: `base` would have it too.
    base = cls.from_pretrained(checkpoint)
    stock = logits(base, tokens)
    by_peft = logits(PeftModel.from_pretrained(base, out), tokens)
    by_transformers = logits(cls.from_pretrained(out), tokens)
    assert (stock - expected).abs().max() > 1e-2
    torch.testing.assert_close(by_peft, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_transformers, expected, rtol=1e-4, atol=1e-4)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model.eval()(input_ids=tokens).logits


# What transformers renamed and TRL still uses, and what moe_lora says of dense models.
EXPECTED = f"gradient_checkpointing` is deprecated|{NO_EXPERTS}|gives all experts the same rank"
# Kind -> options beyond those of the other runs, and rows of the summary with their modules.
COMMANDS = {
    "mistral": (("--lora_target_modules", "all-linear"), {"attention": "8", "dense MLP": "6"}),
    "qwen3_moe": (("--gradient_checkpointing", "true"), {"routed experts": "2", "attention": "8"}),
    "mistral4": (("--bf16", "true", "--dtype", "bfloat16"), {"routed experts": "2", "attention": "10"}),
    "llama4_text": (
        ("--lora_target_modules", "all-linear"),
        {"routed experts": "2", "shared experts": "6", "attention": "8"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command(name: str, tmp_path: Path) -> None:
    """The stock command in processes of its own: what a user types and reads."""
    kind = next(kind for kind in KINDS if kind.name == name)
    options, rows = COMMANDS[name]
    save(kind, tmp_path / "model")
    done = run([*command(tmp_path), *options], tmp_path)
    assert done.returncode == 0, done.stderr
    assert (NO_EXPERTS in done.stderr) == kind.is_dense
    unexpected = [text for text in python_warnings(done.stderr) if not re.search(EXPECTED, text)]
    assert unexpected == []
    summary = {row: modules for row, modules in table(done.stdout).items() if modules != "0"}
    assert summary == rows
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert [key for key, tensor in trained.items() if ".lora_B" in key and not tensor.any()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("peft_type", "more"), [("moe_lora", ("--moe_expert_rank", "by_share", "--lora_r", "4")), ("moe_esft", ())]
)
def test_the_command_with_a_profile(peft_type: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """Experts that are chosen by what the data uses: told before the first step, and alone in the file."""
    kind = next(kind for kind in KINDS if kind.name == "qwen3_moe")
    cls = save(kind, tmp_path / "model")
    model = cls.from_pretrained(tmp_path / "model")
    measure_profile(model, [{"input_ids": torch.arange(64).reshape(2, 32)}]).save(tmp_path / "profile.json")
    chosen = ("--moe_expert_selection", "profile:profile.json", "--moe_experts_per_layer", "2")
    done = run([*command(tmp_path, peft_type, lora_r=None), *chosen, *more], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [text for text in python_warnings(done.stderr) if not re.search(EXPECTED, text)] == []
    assert "routed experts: 2 of 8 in each layer (25%)" in done.stdout
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    profile = ExpertProfile.load(tmp_path / "profile.json")
    for layer in profile.layers:
        key = f"base_model.model.{layer.experts[0]}."
        own = {name: tensor for name, tensor in trained.items() if name.startswith(key)}
        indices = [index for name, tensor in own.items() if "_selected." in name for index in tensor.tolist()]
        assert sorted(indices) == [*by_number(layer.shares(), 2)]
        others = [tensor for name, tensor in own.items() if "_selected." not in name]
        assert others
        assert all(len(tensor) <= 2 for tensor in others)
        assert any(tensor.any() for tensor in others)
    PeftModel.from_pretrained(model, tmp_path / "out")


def command(directory: Path, peft_type: str = "moe_lora", lora_r: str | None = "4") -> list[str]:
    options = {
        "model_name_or_path": "model",
        "dataset_name": os.fspath(DATA),
        "dtype": "float32",
        "peft_type": peft_type,
        **({"lora_r": lora_r} if lora_r else {}),
        "max_steps": "2",
        "per_device_train_batch_size": "4",
        "max_length": "96",
        "learning_rate": "1e-2",
        "use_cpu": "true",
        "bf16": "false",
        "gradient_checkpointing": "false",
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": "out",
    }
    return [TRL, "sft", *(word for name, value in options.items() for word in (f"--{name}", value))]


def table(output: str) -> dict[str, str]:
    """Rows of the first table of the summary: part -> number of modules."""
    rows = [[cell.strip() for cell in line.split("│")] for line in output.splitlines() if line.startswith("│")]
    return {part: modules for _, part, modules, *_ in rows[: len(rows) // 2]}


def python_warnings(errors: str) -> list[str]:
    """What Python's warnings in stderr say."""
    return re.findall(r"^\S+:\d+: \w*Warning: (.*)$", errors, re.MULTILINE)
