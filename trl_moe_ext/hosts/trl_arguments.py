"""The options `--peft_type`, `--moe_*` and `--router_mode`: TRL's `ModelConfig` with our fields."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from trl.trainer.model_config import ModelConfig

from trl_moe_ext.errors import ConfigError, near_matches
from trl_moe_ext.hosts.tuner_types import TUNERS

__all__ = ["CONFIG_FIELDS", "MOE_TYPES", "PEFT_TYPES", "MoeModelConfig", "without_our_adapter"]

MOE_TYPES = tuple(tuner.option for tuner in TUNERS)
PEFT_TYPES = ("lora", *MOE_TYPES)

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
# What has no meaning where the weights themselves are trained -> what to do instead.
_NOT_WITH_ESFT = {
    **dict.fromkeys(("moe_expert_r", "moe_expert_alpha", "moe_expert_rank"), "there is no rank"),
    **dict.fromkeys(("moe_kernel", "moe_save_activations"), "it has one implementation"),
    "moe_router_bias": "balance the experts by --router_aux_loss_coef",
    "router_mode": "to train the routers name them in --lora_modules_to_save",
    **dict.fromkeys(("use_rslora", "use_dora", "lora_target_parameters"), "it is for low-rank adapters"),
}
# TRL always has a value for these, so one that is given can be told from none by its difference alone.
_IGNORED_BY_ESFT = ("lora_r", "lora_alpha", "lora_dropout")
_DEFAULTS = {option.name: option.default for option in fields(ModelConfig)}


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
            self.peft_type = _known_peft_type(self.peft_type)
            self.use_peft = True
        # A YAML file may hold a single value where the command line always gives a list.
        for name in ("moe_target", "moe_layers_to_transform", "moe_exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list):
                setattr(self, name, [value])
        self._check_use()
        self._check_ranges()

    @property
    def is_ours(self) -> bool:
        """Whether an adapter type of this package was asked for."""
        return self.peft_type in MOE_TYPES

    def as_stock(self) -> ModelConfig:
        """The same arguments without our fields, for code that is to behave as if we were not installed."""
        return ModelConfig(**{option.name: getattr(self, option.name) for option in fields(ModelConfig)})

    def _check_use(self) -> None:
        if not self.is_ours:
            given = [f"--{name}" for name in CONFIG_FIELDS if self._is_given(name)]
            if given:
                raise ConfigError(without_our_adapter(given, self.peft_type))
        elif self.peft_type == "moe_esft":
            self._check_esft()
        elif self.use_dora:
            raise ConfigError(
                "--use_dora has no meaning on routed experts; leave it out, or use --peft_type lora without --moe_*"
            )

    def _check_esft(self) -> None:
        for name, remedy in _NOT_WITH_ESFT.items():
            if self._is_given(name):
                raise ConfigError(
                    f"--{name} has no effect with --peft_type moe_esft, which trains the weights themselves "
                    f"({remedy}); leave it out, or use --peft_type moe_lora"
                )
        ignored = [f"--{name}" for name in _IGNORED_BY_ESFT if getattr(self, name) != _DEFAULTS[name]]
        if ignored:
            warnings.warn(
                f"{', '.join(ignored)}: no effect with --peft_type moe_esft, which trains the weights themselves",
                stacklevel=2,
            )

    def _is_given(self, name: str) -> bool:
        # A flag that is off asks for nothing; a zero does.
        value = getattr(self, name)
        return value is not None and value is not False

    def _check_ranges(self) -> None:
        if self.peft_type is None:
            return  # stock LoRA, whose checks are PEFT's
        for name in ("lora_r", "moe_expert_r"):
            rank = getattr(self, name)
            if rank is not None and not _is_int(rank, minimum=1):
                raise ConfigError(f"--{name} is {rank!r}, which is not a rank; use a whole number of at least 1")
        if self.moe_expert_selection is not None and not isinstance(self.moe_expert_selection, str):
            raise ConfigError(
                f"--moe_expert_selection is {self.moe_expert_selection!r}; use 'all', or 'profile:FILE' with a "
                "file of `trl-moe profile`"
            )
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


def without_our_adapter(given: Sequence[str], peft_type: str | None) -> str:
    """The message for options of ours that nobody would read."""
    found = f"--peft_type is {peft_type}" if peft_type else "--peft_type is not given"
    return (
        f"{', '.join(given)}: no effect, because {found}; use --peft_type moe_lora, or leave "
        f"{'it' if len(given) == 1 else 'them'} out"
    )


def _known_peft_type(given: Any) -> str:
    # Saved adapters have the type in capitals; both spellings mean the same.
    name = str(given).lower()
    if name not in PEFT_TYPES:
        raise ConfigError(f"--peft_type {given} is unknown; {near_matches(name, PEFT_TYPES)}")
    return name


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum
