"""Options of MOE_LORA, and the refusal of LoRA options that have no meaning on experts."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from peft import LoraConfig, PeftType

from trl_moe_ext._version import __version__
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.tuners.targets.options import TargetOptions, check_words

ACTIVATION_WORDS = ("gate_up", "none")
ROUTER_MODES = ("frozen", "lora", "full")
EXPERT_RANKS = ("uniform", "by_share")

# Options of LoraConfig that change how a Linear is adapted and that nobody has defined for a stack of experts. An
# adapter that ignored them on its largest part would not be what was asked for.
_REFUSED = {
    "use_dora": "DoRA's magnitude needs the norm of every merged expert weight",
    "lora_bias": "expert stacks have no bias of a low-rank branch",
    "fan_in_fan_out": "the orientation of expert weights is read from the module",
    "bias": "expert biases would stay frozen",
    "layer_replication": "replicated layers would share one stack of experts",
    "use_qalora": "it is defined for quantised Linears",
    "use_bdlora": "it is defined for Linears",
    "velora_config": "it is defined for Linears",
    "kasa_config": "it is defined for Linears",
    "monteclora_config": "it is defined for Linears",
    "arrow_config": "it is defined for Linears",
    "alora_invocation_tokens": "expert rows have no position in the sequence",
    "megatron_config": "Megatron layers are not routed experts of transformers",
}
_INITIALISATIONS = (True, False, "gaussian")


@dataclass
class MoeLoraConfig(TargetOptions, LoraConfig):  # type: ignore[misc]
    """Configuration of `MoeLoraModel`: LoRA on routed experts and on ordinary Linears.

    Everything of `peft.LoraConfig` that has a meaning on experts works as there; the rest is refused by name.
    `target_modules` chooses ordinary Linears only. Routed experts are chosen by `moe_target`, which is described in
    `TargetOptions`, and which of them by the options of `ExpertSelectionOptions`.

    Args:
        expert_r: rank on experts; `r` if None.
        expert_alpha: alpha on experts; `lora_alpha` if None. The scaling is ``expert_alpha / expert_r``, with rsLoRA
            ``expert_alpha / sqrt(expert_r)``.
        expert_rank: ``uniform``; or ``by_share``, which gives experts that the data uses more a higher rank within the
            same number of parameters: between a quarter and four times `expert_r`, which is their mean. It takes a
            profile as `expert_selection`. An expert with an entry of its own in `rank_pattern` keeps that rank, and
            the others get theirs as if it were not there. Such ranks are saved as entries of `rank_pattern`.
        router_mode: whether the router is trained: ``frozen``; ``lora``, the same as ``router`` in `moe_target`; or
            ``full``, a copy of every router, which PEFT saves with the adapter (`modules_to_save`). None is ``lora``
            if `moe_target` has ``router``, else ``frozen``.
        router_bias: give each expert a bias that takes part in the choice of experts and in nothing else, for
            balancing without a loss (arXiv 2408.15664). It starts at zero, no gradient reaches it, and it is saved
            with the adapter; `MoeSFTTrainer` moves it (`router_bias_update_rate`).
        saved_with: the version of this package that saved the adapter; None for one that was never saved.
        kernel: name of the implementation, see ``trl-moe plugins``. Not saved with the adapter.
        save_activations: what the experts keep for the backward pass besides their tokens: ``gate_up``, the output of
            the first projection, or ``none``, which computes it again: less memory for one more product. Under
            gradient checkpointing, which computes everything again, both are the same. Not saved with the adapter.

    Raises:
        ConfigError: an option is out of range, unknown, or has no meaning on experts.
    """

    expert_r: int | None = field(default=None, metadata={"help": "Rank on routed experts; r if not given"})
    expert_alpha: float | None = field(
        default=None, metadata={"help": "Alpha on routed experts; lora_alpha if not given"}
    )
    expert_rank: str = field(default="uniform", metadata={"help": "Ranks of the experts: " + ", ".join(EXPERT_RANKS)})
    router_mode: str | None = field(
        default=None,
        metadata={"help": "Whether the router is trained: " + ", ".join(ROUTER_MODES) + "; frozen if not given"},
    )
    router_bias: bool = field(
        default=False,
        metadata={"help": "A bias of each expert for their choice alone, to balance them without a loss"},
    )
    saved_with: str | None = field(default=None, metadata={"help": "Written on saving; leave empty"})
    kernel: str = field(default="fused", metadata={"help": "Kernel of the routed experts, see `trl-moe plugins`"})
    save_activations: str = field(
        default="gate_up",
        metadata={"help": "What experts keep for the backward pass: " + ", ".join(ACTIVATION_WORDS)},
    )

    def __post_init__(self) -> None:
        _refuse_meaningless(self)
        super().__post_init__()
        self.peft_type = PeftType.MOE_LORA
        # Full name of an expert -> its rank, written by the tuner for each model. Beside `rank_pattern` and no field:
        # a copy with other options would take what an earlier use has found for the user's own ranks.
        self.settled_ranks: dict[str, int] = {}
        self.check_targets()
        check_words("save_activations", [self.save_activations], ACTIVATION_WORDS)
        check_words("expert_rank", [self.expert_rank], EXPERT_RANKS)
        self.check_selection(ranks_by_share=self.expert_rank == "by_share")
        if self.expert_rank == "by_share" and (self.expert_r or self.r) == 1:
            raise ConfigError(
                "expert_rank='by_share' has no effect with rank 1, which has no smaller one; use expert_r=4"
            )
        if self.expert_rank == "by_share" and self.profile_path is None:
            raise ConfigError(
                "expert_rank='by_share' has no effect without a profile; add expert_selection=profile:<file>, see "
                "`trl-moe profile --help`"
            )
        self._settle_router_mode()
        for name in ("r", "expert_r"):
            rank = getattr(self, name)
            if rank is not None and (not isinstance(rank, int) or rank < 1):
                raise ConfigError(f"{name}={rank!r} is not a rank; use an integer of at least 1")
        for name, rank in self.rank_pattern.items():
            if not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"rank_pattern[{name!r}]={rank!r} is not a rank; use an integer of at least 1")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"lora_dropout={self.lora_dropout} is not a probability below 1")
        if not self.moe_target and not self.target_modules and not self.target_parameters:
            if self.router_mode == "full":
                raise ConfigError(
                    "moe_target is empty: PEFT trains copies of modules beside LoRA only. Put something else than the "
                    "router into moe_target, or use router_mode='lora'"
                )
            raise ConfigError("moe_target is empty and no target_modules are given: nothing would be trained")
        given = {
            name: getattr(self, name) not in (None, False) for name in ("expert_r", "expert_alpha", "router_bias")
        }
        given["expert_selection"] = self.selects_experts
        for name in (name for name, is_given in given.items() if is_given and not self.adapts_experts):
            raise ConfigError(
                f"{name} has no effect: moe_target={self.moe_target} leaves the experts out; "
                f"add 'experts' to moe_target or remove {name}"
            )

    def _settle_router_mode(self) -> None:
        if self.router_mode is None:
            return
        check_words("router_mode", [self.router_mode], ROUTER_MODES)
        if self.router_mode == "lora":
            self.moe_target = [*dict.fromkeys([*self.moe_target, "router"])]
        elif "router" in self.moe_target:
            raise ConfigError(
                f"router_mode={self.router_mode!r} contradicts 'router' in moe_target, which puts LoRA on the router; "
                "leave 'router' out of moe_target, or use router_mode='lora'"
            )

    def to_dict(self) -> dict[str, Any]:
        """The saved form, without how this machine computes: that is not what the adapter is."""
        saved: dict[str, Any] = super().to_dict()
        for name in ("kernel", "save_activations"):
            saved.pop(name, None)
        ranks = {**self.rank_pattern, **self.settled_ranks}
        return saved | {"rank_pattern": ranks, "saved_with": f"trl_moe_ext {__version__}"}


def _refuse_meaningless(config: MoeLoraConfig) -> None:
    defaults = {f.name: _default(f) for f in fields(LoraConfig)}
    for name, reason in _REFUSED.items():
        value = getattr(config, name, None)
        if value != defaults.get(name):
            raise ConfigError(
                f"{name}={value!r} has no meaning with moe_lora: {reason}. Leave it out, or use peft_type lora"
            )
    if config.init_lora_weights not in _INITIALISATIONS:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r} is not defined on stacks of experts; "
            "use True (Kaiming), 'gaussian' or False"
        )


def _default(option: Field[Any]) -> Any:
    return option.default_factory() if option.default_factory is not MISSING else option.default
