"""How the load of the experts moved over a run: some 200 records at most, however long the run is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.files import write_atomically

__all__ = ["HISTORY_FILE", "LoadRecord", "RouterHistory", "relative_load"]

HISTORY_FILE = "router_history.json"
# Of 48 layers with 128 experts these are some 10 MB. More could not be told apart in a picture.
MAX_RECORDS = 200
_DIGITS = 5  # of a share: a thousandth of the uniform share of 128 experts


@dataclass(frozen=True)
class LoadRecord:
    """The load at one step: of each layer, by its label, the share of the routed tokens that each expert got."""

    step: int
    layers: Mapping[str, tuple[float, ...]]

    def table(self, labels: Sequence[str]) -> list[list[float]]:
        """Relative load, layers × experts, in the order of `labels`; NaN where there is no such layer or expert."""
        rows = [relative_load(self.layers.get(label, ())) for label in labels]
        width = max(map(len, rows), default=0)
        return [row + [math.nan] * (width - len(row)) for row in rows]


class RouterHistory:
    """Records in the order of their steps. The first and the last one are always kept."""

    def __init__(self, records: Iterable[LoadRecord] = ()) -> None:
        self.records = list(records)

    @property
    def labels(self) -> list[str]:
        """Labels of all layers, in the order in which they were first recorded."""
        return list(dict.fromkeys(label for record in self.records for label in record.layers))

    def append(self, step: int, shares: Mapping[str, Iterable[float]]) -> None:
        """Add the load at `step`; a record of the same step is replaced.

        Args:
            step: optimisation step, not below that of the last record.
            shares: of each layer, by its label, the share of each expert; rounded to five digits. A layer that no
                token went through, whose shares are NaN, is left out.

        Raises:
            ValueError: `step` is below that of the last record.
        """
        if self.records and step < self.records[-1].step:
            raise ValueError(
                f"step {step} is before the last record, of step {self.records[-1].step}; call truncate({step}) first"
            )
        rows = {label: tuple(round(float(share), _DIGITS) for share in row) for label, row in shares.items()}
        layers = {label: row for label, row in rows.items() if not any(map(math.isnan, row))}
        if self.records and (step == self.records[-1].step or self._is_last_between()):
            self.records.pop()
        self.records.append(LoadRecord(step, layers))
        if len(self.records) > MAX_RECORDS:
            self.records = self.records[:-1:2] + self.records[-1:]

    def _is_last_between(self) -> bool:
        """Whether the last record is nearer to the one before than the records of the start, once these are thinned.

        It was kept because it was the last: with the next one it would make the end denser than the rest.
        """
        if len(self.records) < 3:
            return False
        first, second, *_, previous, last = (record.step for record in (*self.records[:2], *self.records[-2:]))
        return last - previous < second - first

    def truncate(self, step: int) -> None:
        """Forget what came after `step`: a run that goes on from a checkpoint will see it again."""
        self.records = [record for record in self.records if record.step <= step]

    def max_vio(self, label: str) -> list[tuple[int, float]]:
        """Steps and MaxVio of a layer: the load of its busiest expert over the mean load, less one; 0 is balance."""
        loads = ((record.step, relative_load(record.layers.get(label, ()))) for record in self.records)
        return [(step, max(load) - 1) for step, load in loads if load and not math.isnan(load[0])]

    def save(self, path: Path) -> None:
        """Write the history as JSON; a killed process leaves the old file or the new one."""
        records = [{"step": record.step, "layers": record.layers} for record in self.records]
        write_atomically(path, json.dumps({"records": records}, separators=(",", ":")))

    @classmethod
    def load(cls, path: Path) -> RouterHistory:
        """Read what `save` has written; empty if there is no such file.

        Raises:
            ConfigError: the file is damaged.
        """
        if not path.exists():
            return cls()
        try:
            records = json.loads(path.read_text(encoding="utf-8"))["records"]
            return cls(LoadRecord(int(record["step"]), _layers(record["layers"])) for record in records)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}); remove it to go on without the history") from error


def relative_load(shares: Sequence[float]) -> list[float]:
    """Each share over the mean share: 1 is balance. NaN for all where nothing was routed."""
    total = sum(shares)
    return [share * len(shares) / total if total else math.nan for share in shares]


def _layers(layers: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    return {label: tuple(map(float, shares)) for label, shares in layers.items()}
