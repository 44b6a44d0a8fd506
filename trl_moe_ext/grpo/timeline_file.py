"""A timeline as a file, which outlives its run: JSON lines, one a span."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.files import write_atomically
from trl_moe_ext.grpo.timeline import GENERATOR, REWARDS, TRAINER, Span, Timeline

__all__ = ["TimelineRecord"]

_FORMAT = 1


@dataclass(frozen=True)
class TimelineRecord:
    """A timeline that goes on no more.

    Attributes:
        spans: in the order of their start; of a long run without the oldest.
        seconds: lane -> state -> seconds of the whole run, those of spans that were dropped included.
    """

    spans: tuple[Span, ...]
    seconds: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, timeline: Timeline) -> TimelineRecord:
        """The timeline up to now."""
        lanes = {lane: timeline.seconds(lane) for lane in (TRAINER, GENERATOR, REWARDS)}
        spans = sorted(timeline.spans(), key=lambda span: (span.start, span.lane))
        return cls(tuple(spans), {lane: seconds for lane, seconds in lanes.items() if seconds})

    def shares(self, lane: str) -> dict[str, float]:
        """State -> its part of the time of `lane`, the largest first; empty for a lane without any."""
        seconds = self.seconds.get(lane, {})
        total = sum(seconds.values())
        return {s: seconds[s] / total for s in sorted(seconds, key=lambda s: -seconds[s])} if total else {}

    def save(self, path: Path) -> None:
        """Write a line of the seconds, then one for each span.

        Raises:
            OSError: the file cannot be written.
        """
        head = {"format": _FORMAT, "seconds": {lane: dict(states) for lane, states in self.seconds.items()}}
        lines = [json.dumps(line) for line in (head, *map(asdict, self.spans))]
        write_atomically(path, "\n".join(lines) + "\n")

    @classmethod
    def load(cls, path: Path) -> TimelineRecord:
        """Read what `save` has written.

        Raises:
            ConfigError: the file is damaged or of another version of this package.
            OSError: there is no such file.
        """
        try:
            head, *spans = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if head["format"] != _FORMAT:
                raise ConfigError(f"{path} is of another version of trl_moe_ext; read it with the one that wrote it")
            return cls(tuple(Span(**span) for span in spans), head["seconds"])
        except (ValueError, LookupError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is damaged ({error!r}); it holds no timeline that can be read") from error
