"""The measurements of a run and the figures that they give."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from trl_moe_ext.bench.fit import Sizes
from trl_moe_ext.bench.measure import Measured
from trl_moe_ext.bench.plan import Request
from trl_moe_ext.bench.process import Missing


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    return Spread(statistics.median(values), min(values), max(values))


@dataclass
class Row:
    """One peer with one number of tokens; either `rounds` or `missing` is there."""

    tokens: int
    peer: str
    rounds: list[Measured] = field(default_factory=list)
    missing: Missing | None = None

    @property
    def milliseconds(self) -> Spread | None:
        """Of a step: of the rounds' medians."""
        return spread([1e3 * measured.median for measured in self.rounds]) if self.rounds else None

    @property
    def megabytes(self) -> Spread | None:
        """Over the idle model, in powers of 1000."""
        known = [measured.extra_bytes / 1e6 for measured in self.rounds if measured.extra_bytes is not None]
        return spread(known) if known else None

    @property
    def trained_megabytes(self) -> float | None:
        """Of trained parameters, gradients and AdamW's states, in powers of 1000."""
        return self.rounds[0].trained_bytes / 1e6 if self.rounds else None


@dataclass
class Results:
    """All rows of a run.

    Attributes:
        errors: peer -> relative errors of its gradients, or why there are none; empty unless the experts are alone.
    """

    request: Request
    sizes: Sizes
    rows: list[Row]
    errors: dict[str, dict[str, float] | Missing] = field(default_factory=dict)

    def row(self, tokens: int, peer: str) -> Row | None:
        """The row of that peer, if it was asked for."""
        return next((row for row in self.rows if (row.tokens, row.peer) == (tokens, peer)), None)

    def ratio(self, row: Row, other: str, figure: str) -> float | None:
        """The median of `figure`, a property of `Row`, over that of another peer with as many tokens."""
        base = self.row(row.tokens, other)
        own, others = getattr(row, figure), getattr(base, figure) if base else None
        return own.median / others.median if own and others and others.median > 0 else None

    @property
    def failures(self) -> list[str]:
        """What should have worked and did not, one line each."""
        rows = [(f"{row.peer} at {row.tokens} tokens", row.missing) for row in self.rows]
        errors = [(f"gradient errors of {peer}", found) for peer, found in self.errors.items()]
        return [f"{what}: {m.reason}" for what, m in rows + errors if isinstance(m, Missing) and m.is_failure]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a machine to read."""
        return {
            "command": self.request.command,
            **asdict(self.request),
            "sizes": asdict(self.sizes),
            "results": [self._row_as_dict(row) for row in self.rows],
            "gradient_errors": {
                peer: {"missing": asdict(found)} if isinstance(found, Missing) else found
                for peer, found in self.errors.items()
            },
        }

    def _row_as_dict(self, row: Row) -> dict[str, Any]:
        return {
            **asdict(row),
            "milliseconds": asdict(row.milliseconds) if row.milliseconds else None,
            "megabytes": asdict(row.megabytes) if row.megabytes else None,
            "trained_megabytes": row.trained_megabytes,
            "time_over_frozen": self.ratio(row, "frozen", "milliseconds"),
            "memory_over_frozen": self.ratio(row, "frozen", "megabytes"),
            "time_over_moe_lora": self.ratio(row, "moe_lora", "milliseconds"),
            "memory_over_moe_lora": self.ratio(row, "moe_lora", "megabytes"),
        }
