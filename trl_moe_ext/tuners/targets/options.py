"""The options that say what an adapter takes from a model, which the configurations of all tuners here have."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trl_moe_ext.errors import ConfigError, near_matches
from trl_moe_ext.tuners.selection.options import ExpertSelectionOptions

TARGET_WORDS = ("experts", "attention", "shared_experts", "dense_mlp", "router")
PROJECTION_WORDS = ("both", "gate_up", "down")


@dataclass
class TargetOptions(ExpertSelectionOptions):
    """What to train: parts of the model by the words of this package, and modules as in every configuration of PEFT.

    Args:
        moe_target: any of ``experts``, ``attention``, ``shared_experts``, ``dense_mlp``, ``router``. With
            `target_modules` given, only ``experts`` and ``router`` of it apply. On a model without routed experts,
            ``experts`` means its dense MLP.
        expert_projections: ``both``, or only ``gate_up`` (the first projection) or ``down`` (the second).
    """

    moe_target: list[str] | str = field(
        default_factory=lambda: ["experts", "attention"],
        metadata={"help": "What to adapt: " + ", ".join(TARGET_WORDS)},
    )
    expert_projections: str = field(
        default="both", metadata={"help": "Which projections of the experts: " + ", ".join(PROJECTION_WORDS)}
    )

    if TYPE_CHECKING:  # of the configuration of PEFT that this is mixed into
        target_modules: Any = None
        exclude_modules: Any = None
        target_parameters: Any = None
        modules_to_save: Any = None
        layers_to_transform: Any = None
        layers_pattern: Any = None

    def check_targets(self) -> None:
        """Refuse words that are unknown; a single word becomes a list.

        Raises:
            ConfigError: see above.
        """
        if isinstance(self.moe_target, str):
            self.moe_target = [self.moe_target]
        check_words("moe_target", self.moe_target, TARGET_WORDS)
        check_words("expert_projections", [self.expert_projections], PROJECTION_WORDS)

    @property
    def adapts_experts(self) -> bool:
        """Whether routed experts may be adapted: through `moe_target`, `target_modules` or `target_parameters`."""
        return "experts" in self.moe_target or bool(self.target_modules) or bool(self.target_parameters)


def check_words(option: str, words: Collection[str], known: tuple[str, ...]) -> None:
    """Raise ConfigError if a word of an option is not known."""
    for word in words:
        if word not in known:
            raise ConfigError(f"{option}: {word!r} is unknown; {near_matches(str(word), known)}")
