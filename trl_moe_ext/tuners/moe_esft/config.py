"""Options of MOE_ESFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from trl_moe_ext._version import __version__
from trl_moe_ext.errors import ConfigError
from trl_moe_ext.tuners.selection.options import ALL
from trl_moe_ext.tuners.targets.options import TARGET_WORDS, TargetOptions

NO_SELECTION = (
    "expert_selection is not given: say profile:<file> with a file of `trl-moe profile` (see its --help), or 'all' to "
    "train every expert in full"
)


@dataclass
class MoeEsftConfig(TargetOptions, PeftConfig):  # type: ignore[misc]
    """Configuration of `MoeEsftModel`: expert-specialised fine-tuning (arXiv 2407.01906).

    The chosen experts' own weights and biases are trained, and no others. What is trained, saved and merged is the
    difference from the frozen weights, which starts at zero. The paper also trains the shared experts and attention
    of some runs: name them in `moe_target`.

    Args:
        moe_target: as in `TargetOptions`; by default the routed experts alone.
        expert_selection: which experts, as in `ExpertSelectionOptions`. It has to be given: ``all`` trains every
            expert in full, with the gradients and optimiser states of full fine-tuning.
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in
            `peft.LoraConfig`. The Linears that `target_modules` names are trained in full.
        saved_with: the version of this package that saved the adapter; None for one that was never saved.

    Raises:
        ConfigError: an option is out of range, unknown, missing or without effect.
    """

    moe_target: list[str] | str = field(
        default_factory=lambda: ["experts"], metadata={"help": "What to train in full: " + ", ".join(TARGET_WORDS)}
    )
    expert_selection: str = field(
        default="", metadata={"help": "Which routed experts to train: profile:<file> of `trl-moe profile`, or all"}
    )
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linears to train in full, by the end of their names or a regular expression"}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "What to leave out of them"})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of which PEFT trains and saves a copy, such as a router"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only layers with these indices"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that layers_to_transform counts"}
    )
    saved_with: str | None = field(default=None, metadata={"help": "Written on saving; leave empty"})

    target_parameters = None  # what the resolver of targets also looks at, and PEFT

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.MOE_ESFT
        self.check_targets()
        if not self.moe_target and not self.target_modules:
            raise ConfigError("moe_target is empty and no target_modules are given: nothing would be trained")
        self._check_layers()
        # On the config, but not one of its fields: it goes where the config goes, and is not saved.
        self.selection_is_given = bool(self.expert_selection) or self.selected_experts is not None
        if not self.selection_is_given and "experts" in self.moe_target:
            raise ConfigError(NO_SELECTION)
        self.expert_selection = self.expert_selection or ALL
        if self.selects_experts and not self.adapts_experts:
            raise ConfigError(
                f"expert_selection has no effect: moe_target={self.moe_target} leaves the experts out; add 'experts' "
                "to moe_target or remove expert_selection"
            )
        self.check_selection()

    def _check_layers(self) -> None:
        """Refuse options of layers that PEFT would leave aside; lists become sets, as in its own configurations."""
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform; give the indices "
                "of the layers, or leave it out"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError(
                f"layers_to_transform has no effect beside the regular expression target_modules="
                f"{self.target_modules!r}; name the layers in it, or give a list"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """The saved form."""
        saved: dict[str, Any] = super().to_dict()
        return saved | {"saved_with": f"trl_moe_ext {__version__}"}
