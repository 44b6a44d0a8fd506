"""The options that choose experts, which the configurations of all tuners of this package have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_moe_ext.errors import ConfigError, near_matches
from trl_moe_ext.profiles.profile import SCORES

ALL = "all"
PROFILE = "profile:"


@dataclass
class ExpertSelectionOptions:
    """Which of the routed experts are trained; the others stay as they are.

    Args:
        expert_selection: ``all``, or ``profile:<file>`` with a file of ``trl-moe profile``: the experts that the data
            uses most.
        expert_coverage: with a profile, the fewest experts of each layer on which this part of the choices falls (each
            token makes top-k), above 0 and at most 1.
        experts_per_layer: with a profile, in place of `expert_coverage`: so many experts of each layer.
        expert_score: what use is measured by: ``token_share``, the part of the choices, or ``gate_score``, the mean
            weight.
        selected_experts: name of each module of experts -> the chosen ones. Written by the tuner and saved with the
            adapter, which so does not need the profile again; can also be given in the place of a profile. Of modules
            that it does not name all experts are trained. Until the config is saved its profile decides, for each
            model that it is used on, and `selected_experts` has to say the same.
    """

    expert_selection: str = field(
        default=ALL, metadata={"help": "Which routed experts to train: all, or profile:<file> of `trl-moe profile`"}
    )
    expert_coverage: float | None = field(
        default=None, metadata={"help": "With a profile: the fewest experts that get this part of the choices"}
    )
    experts_per_layer: int | None = field(
        default=None, metadata={"help": "With a profile: how many experts of each layer"}
    )
    expert_score: str = field(
        default="token_share", metadata={"help": "What a profile's experts are ordered by: " + ", ".join(SCORES)}
    )
    selected_experts: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Module of experts -> indices; written by the tuner"}
    )

    @property
    def profile_path(self) -> Path | None:
        """The file that `expert_selection` names."""
        if not self.expert_selection.startswith(PROFILE):
            return None
        return Path(self.expert_selection.removeprefix(PROFILE)).expanduser()  # the shell sees no ~ behind a colon

    @property
    def says_how_many(self) -> bool:
        """Whether a profile is to choose experts, and not there for ranks alone."""
        return self.expert_coverage is not None or self.experts_per_layer is not None

    @property
    def is_decided_by_profile(self) -> bool:
        """Whether there is a profile to be read: a saved adapter has what came of it.

        A config that was saved before its first use has not.
        """
        if self.profile_path is None:
            return False
        is_saved = getattr(self, "saved_with", None) is not None
        return not is_saved or (self.says_how_many and self.selected_experts is None)

    @property
    def selects_experts(self) -> bool:
        """Whether some experts may be left out."""
        return self.expert_selection != ALL or self.selected_experts is not None

    def check_selection(self, *, ranks_by_share: bool = False) -> None:
        """Refuse options that contradict each other or have no effect.

        Args:
            ranks_by_share: the profile is wanted for ranks as well, and so need not choose.

        Raises:
            ConfigError: see above.
        """
        path = self.profile_path if isinstance(self.expert_selection, str) else None
        if self.expert_selection != ALL and (path is None or not path.name):
            raise ConfigError(
                f"expert_selection={self.expert_selection!r} is unknown; use 'all', or 'profile:<file>' with a file "
                "that `trl-moe profile` has written"
            )
        if self.expert_score not in SCORES:
            raise ConfigError(
                f"expert_score={self.expert_score!r} is unknown; {near_matches(self.expert_score, SCORES)}"
            )
        if self.expert_score != SCORES[0] and path is None:
            raise ConfigError(
                f"expert_score={self.expert_score!r} has no effect without a profile; add "
                "expert_selection=profile:<file>, or leave it out"
            )
        self._check_amount(path, ranks_by_share)
        self._check_selected(self.selected_experts)
        if self.is_decided_by_profile and self.selected_experts is not None and not self.says_how_many:
            raise ConfigError(
                "selected_experts has no place beside a profile that is there for ranks alone; set "
                "selected_experts=None, or let the profile choose with expert_coverage or experts_per_layer"
            )

    def _check_amount(self, path: Path | None, ranks_by_share: bool) -> None:
        given = {"expert_coverage": self.expert_coverage, "experts_per_layer": self.experts_per_layer}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) == 2:
            raise ConfigError("expert_coverage and experts_per_layer both say how many experts; leave one of them out")
        for name, value in given.items():
            if path is None:
                raise ConfigError(
                    f"{name}={value!r} has no effect without a profile; add expert_selection=profile:<file>, see "
                    "`trl-moe profile --help`"
                )
        if path is not None and not given and not ranks_by_share:
            raise ConfigError(
                f"expert_selection={self.expert_selection!r} does not say how many experts; add expert_coverage (0.5: "
                "the fewest that get half of the choices) or experts_per_layer"
            )
        coverage, number = self.expert_coverage, self.experts_per_layer
        if coverage is not None and not (_is_number(coverage) and 0 < coverage <= 1):
            raise ConfigError(
                f"expert_coverage={coverage!r} is not a part of the choices; use a number above 0, at most 1"
            )
        if number is not None and not (_is_index(number) and number >= 1):
            raise ConfigError(f"experts_per_layer={number!r} is not a number of experts; use an integer of at least 1")

    def _check_selected(self, selected: Any) -> None:
        if selected is None:
            return
        if not isinstance(selected, dict) or not selected:
            raise ConfigError(f"selected_experts={selected!r} is not a dict from modules of experts to their indices")
        for name, experts in selected.items():
            is_list = isinstance(experts, list | tuple) and all(_is_index(expert) for expert in experts)
            if not is_list or not experts or len({*experts}) != len(experts):
                raise ConfigError(f"selected_experts[{name!r}]={experts!r}: use a list of different indices from 0")


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
