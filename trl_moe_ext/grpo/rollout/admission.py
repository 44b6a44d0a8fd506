"""How far the generator may run ahead of the trainer."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Admission"]


@dataclass
class Admission:
    """Bounds staleness without waste: a group is not begun that would be too old when its turn to be trained comes.

    The n-th group is trained on at version ``n // groups_per_version`` after the first, in the order of admission; one
    that is begun now has the live version or a later one.

    Attributes:
        max_staleness: versions that a sample may be behind the trainer.
        groups_per_version: groups that the trainer takes between two syncs.
        look_ahead: groups that the trainer was seen to take earlier than the rule says, because its loader prepares
            a batch in advance or its steps take more.
    """

    max_staleness: int
    groups_per_version: int
    look_ahead: int = 0

    def allows(self, admitted: int, versions: int) -> bool:
        """Whether another group may begin.

        Args:
            admitted: groups begun since the start, less those that were skipped or given back.
            versions: how many versions the live one is after that of the start.
        """
        return admitted < (self.max_staleness + versions + 1) * self.groups_per_version + self.look_ahead

    def starved(self) -> None:
        """The trainer waits, nothing is under way and the rule forbids more: let it have one more from now on."""
        self.look_ahead += 1
