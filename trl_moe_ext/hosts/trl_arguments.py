"""The options `--peft_type`, `--moe_*` and `--router_mode`: TRL's `ModelConfig` with our fields."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from trl.trainer.model_config import ModelConfig

from trl_moe_ext.hosts.trl_argument_checks import check_ranges, check_use
from trl_moe_ext.hosts.trl_peft_type import MOE_TYPES, PEFT_TYPES, known_peft_type, without_our_adapter

__all__ = ["CONFIG_FIELDS", "MOE_TYPES", "PEFT_TYPES", "MoeModelConfig", "without_our_adapter"]

# Option -> field of the tuner's config. An option that is not given leaves the field at the tuner's own default.
CONFIG_FIELDS = {
    "moe_target": "moe_target",
    "moe_expert_r": "expert_r",
    "moe_expert_alpha": "expert_alpha",
    "moe_expert_rank": "expert_rank",
    "moe_expert_projections": "expert_projections",
    "moe_expert_selection": "expert_selection",
    "moe_expert_coverage": "expert_coverage",
    "moe_experts_per_layer": "experts_per_layer",
    "moe_expert_score": "expert_score",
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
            "'moe_lora' is LoRA on the routed experts of a mixture-of-experts model and on its attention; 'moe_esft' "
            "trains the weights of chosen experts themselves, see --moe_expert_selection.",
            "metavar": "{" + ",".join(PEFT_TYPES) + "}",
        },
    )
    moe_target: list[str] | None = field(
        default=None,
        metadata={
            "help": "moe_lora, moe_esft: what to adapt, any of 'experts', 'attention', 'shared_experts', 'dense_mlp', "
            "'router'; if not given experts and attention, with moe_esft experts alone. Single Linears are chosen "
            "with --lora_target_modules.",
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
    moe_expert_rank: str | None = field(
        default=None,
        metadata={
            "help": "moe_lora: ranks of the routed experts: 'uniform' (if not given), or 'by_share', more for those "
            "that the data uses more, with the rank as their mean. Takes a profile as --moe_expert_selection.",
            "metavar": "{uniform,by_share}",
        },
    )
    moe_expert_projections: str | None = field(
        default=None,
        metadata={
            "help": "moe_lora, moe_esft: which projections of the routed experts to adapt; both if not given.",
            "metavar": "{both,gate_up,down}",
        },
    )
    moe_expert_selection: str | None = field(
        default=None,
        metadata={
            "help": "moe_lora, moe_esft: which routed experts to train: 'all', or 'profile:FILE' with a file of "
            "`trl-moe profile`, which takes --moe_expert_coverage or --moe_experts_per_layer. All if not given; "
            "moe_esft has to be told.",
            "metavar": "{all,profile:FILE}",
        },
    )
    moe_expert_coverage: float | None = field(
        default=None,
        metadata={
            "help": "moe_lora, moe_esft: of a profile, the fewest experts of each layer to which this part of the "
            "tokens goes, above 0 and at most 1."
        },
    )
    moe_experts_per_layer: int | None = field(
        default=None, metadata={"help": "moe_lora, moe_esft: of a profile, so many experts of each layer."}
    )
    moe_expert_score: str | None = field(
        default=None,
        metadata={
            "help": "moe_lora, moe_esft: what of a profile the experts are ordered by: 'token_share' (if not given), "
            "the part of the choices, or 'gate_score', the mean weight.",
            "metavar": "{token_share,gate_score}",
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
        metadata={
            "help": "moe_lora, moe_esft: indices of the decoder layers to adapt, from 0; all layers if not given."
        },
    )
    moe_exclude_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "moe_lora, moe_esft: names of modules that stay frozen, or one regular expression for full names."
        },
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
            self.peft_type = known_peft_type(self.peft_type)
            self.use_peft = True
        # A YAML file may hold a single value where the command line always gives a list.
        for name in ("moe_target", "moe_layers_to_transform", "moe_exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list):
                setattr(self, name, [value])
        check_use(self, CONFIG_FIELDS)
        check_ranges(self)

    @property
    def is_ours(self) -> bool:
        """Whether an adapter type of this package was asked for."""
        return self.peft_type in MOE_TYPES

    def as_stock(self) -> ModelConfig:
        """The same arguments without our fields, for code that is to behave as if we were not installed."""
        return ModelConfig(**{option.name: getattr(self, option.name) for option in fields(ModelConfig)})
