"""The options `--peft_type`, `--moe_*` and `--router_mode`: TRL's `ModelConfig` with our fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trl.trainer.model_config import ModelConfig

from trl_moe_ext.errors import ConfigError, near_matches

__all__ = ["CONFIG_FIELDS", "PEFT_TYPES", "MoeModelConfig"]

PEFT_TYPES = ("lora", "moe_lora")

# Option -> field of MoeLoraConfig. An option that is not given leaves the field at the tuner's own default.
CONFIG_FIELDS = {
    "moe_target": "moe_target",
    "moe_expert_r": "expert_r",
    "moe_expert_alpha": "expert_alpha",
    "moe_expert_projections": "expert_projections",
    "moe_kernel": "kernel",
    "moe_save_activations": "save_activations",
    "moe_layers_to_transform": "layers_to_transform",
    "moe_exclude_modules": "exclude_modules",
    "moe_router_bias": "router_bias",
    "router_mode": "router_mode",
}


@dataclass
class MoeModelConfig(ModelConfig):  # type: ignore[misc]
    """Arguments of the model and of its adapter, as on the command line or in the YAML file of `--config`.

    Raises:
        ConfigError: `peft_type` is unknown, a number is out of range, or an option would have no effect.
    """

    peft_type: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to train, implies --use_peft: 'lora' is PEFT's LoRA, the same as --use_peft alone; "
            "'moe_lora' is LoRA on the routed experts of a mixture-of-experts model and on its attention.",
            "metavar": "{" + ",".join(PEFT_TYPES) + "}",
        },
    )
    moe_target: list[str] | None = field(
        default=None,
        metadata={
            "help": "moe_lora: what to adapt, any of 'experts', 'attention', 'shared_experts', 'dense_mlp', 'router'; "
            "experts and attention if not given. Single Linears are chosen with --lora_target_modules.",
        },
    )
    moe_expert_r: int | None = field(
        default=None, metadata={"help": "moe_lora: rank on routed experts; --lora_r if not given."}
    )
    moe_expert_alpha: float | None = field(
        default=None,
        metadata={
            "help": "moe_lora: alpha on routed experts; --lora_alpha if not given. Their scaling is alpha / rank, or "
            "alpha / sqrt(rank) with --use_rslora."
        },
    )
    moe_expert_projections: str | None = field(
        default=None,
        metadata={
            "help": "moe_lora: which projections of the routed experts to adapt; both if not given.",
            "metavar": "{both,gate_up,down}",
        },
    )
    moe_kernel: str | None = field(
        default=None,
        metadata={
            "help": "moe_lora: implementation of the routed experts, one of those that `trl-moe plugins` lists; "
            "'fused' if not given."
        },
    )
    moe_save_activations: str | None = field(
        default=None,
        metadata={
            "help": "moe_lora: what routed experts keep for the backward pass: 'gate_up' (if not given), the output "
            "of their first projection, or 'none', which computes it again: less memory, more time. No difference "
            "with --gradient_checkpointing, which is on unless switched off.",
            "metavar": "{gate_up,none}",
        },
    )
    moe_layers_to_transform: list[int] | None = field(
        default=None,
        metadata={"help": "moe_lora: indices of the decoder layers to adapt, from 0; all layers if not given."},
    )
    moe_exclude_modules: list[str] | None = field(
        default=None,
        metadata={"help": "moe_lora: names of modules that stay frozen, or one regular expression for full names."},
    )
    moe_router_bias: bool = field(
        default=False,
        metadata={
            "help": "moe_lora: give each expert a bias that takes part in the choice of experts and in nothing else. "
            "`trl sft` moves it towards equal load with --router_bias_update_rate; it is saved with the adapter."
        },
    )
    router_mode: str | None = field(
        default=None,
        metadata={
            "help": "moe_lora: whether the router is trained: 'frozen' (if not given), 'lora', the same as 'router' "
            "in --moe_target, or 'full', a copy of every router, saved with the adapter.",
            "metavar": "{frozen,lora,full}",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.peft_type is not None:
            self.peft_type = _known_peft_type(self.peft_type)
            self.use_peft = True
        # A YAML file may hold a single value where the command line always gives a list.
        for name in ("moe_target", "moe_layers_to_transform", "moe_exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list):
                setattr(self, name, [value])
        self._check_use()
        self._check_ranges()

    def as_stock(self) -> ModelConfig:
        """The same arguments without our fields, for code that is to behave as if we were not installed."""
        return ModelConfig(**{option.name: getattr(self, option.name) for option in fields(ModelConfig)})

    def _check_use(self) -> None:
        # A flag that is off asks for nothing; a zero does.
        given = [f"--{n}" for n in CONFIG_FIELDS if getattr(self, n) is not None and getattr(self, n) is not False]
        if given and self.peft_type != "moe_lora":
            found = f"--peft_type is {self.peft_type}" if self.peft_type else "--peft_type is not given"
            raise ConfigError(
                f"{', '.join(given)}: no effect, because {found}; use --peft_type moe_lora, or leave "
                f"{'it' if len(given) == 1 else 'them'} out"
            )
        if self.peft_type == "moe_lora" and self.use_dora:
            raise ConfigError(
                "--use_dora has no meaning on routed experts; leave it out, or use --peft_type lora without --moe_*"
            )

    def _check_ranges(self) -> None:
        if self.peft_type is None:
            return  # stock LoRA, whose checks are PEFT's
        for name in ("lora_r", "moe_expert_r"):
            rank = getattr(self, name)
            if rank is not None and not _is_int(rank, minimum=1):
                raise ConfigError(f"--{name} is {rank!r}, which is not a rank; use a whole number of at least 1")
        alpha = self.moe_expert_alpha
        if alpha is not None and not (isinstance(alpha, int | float) and alpha > 0):
            raise ConfigError(f"--moe_expert_alpha is {alpha!r}, but has to be a number above 0")
        layers = self.moe_layers_to_transform
        if layers is not None and not (layers and all(_is_int(layer, minimum=0) for layer in layers)):
            raise ConfigError(f"--moe_layers_to_transform is {layers!r}; use layer indices from 0, or leave it out")
        for name in ("moe_target", "moe_exclude_modules"):
            words = getattr(self, name)
            if words is not None and not (words and all(isinstance(word, str) for word in words)):
                raise ConfigError(f"--{name} is {words!r}; use one or more names, or leave it out")


def _known_peft_type(given: Any) -> str:
    # Saved adapters have the type in capitals; both spellings mean the same.
    name = str(given).lower()
    if name not in PEFT_TYPES:
        raise ConfigError(f"--peft_type {given} is unknown; {near_matches(name, PEFT_TYPES)}")
    return name


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
