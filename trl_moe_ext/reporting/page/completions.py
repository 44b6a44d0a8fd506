"""Completions that a GRPO run has kept: some of its first log and of its last."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_moe_ext.reporting.numbers import figure
from trl_moe_ext.reporting.rollout_files import COMPLETIONS_DIR, COMPLETIONS_FILES

__all__ = ["Completion", "CompletionsAtStep", "read_completions"]

_SHOWN = 4  # of a log
_MOST_CHARACTERS = 1_500  # of a text
_NOT_A_REWARD = ("step", "advantage", "model_version", "lag")


@dataclass(frozen=True)
class Completion:
    """Texts as the model saw and wrote them; `facts` are names and values: rewards, advantage, version."""

    prompt: str
    text: str
    facts: list[tuple[str, str]]


@dataclass(frozen=True)
class CompletionsAtStep:
    """Some of the completions of one log, those with the highest and the lowest advantage among them."""

    step: int
    completions: list[Completion]


def read_completions(directory: Path, last_step: int) -> tuple[list[CompletionsAtStep], str]:
    """The first and the last completions of a run, as TRL's and our trainers write them.

    Args:
        directory: of the run.
        last_step: of its record; what a run that was resumed has thrown away is later than that.

    Returns:
        Them, and a sentence about files that could not be read, empty if there are none.
    """
    files = [path for path in (directory / COMPLETIONS_DIR).glob(COMPLETIONS_FILES) if _step(path) <= last_step]
    files.sort(key=_step)
    found, damaged = [], []
    for path in files[:1] + files[1:][-1:]:
        try:
            found.append(CompletionsAtStep(_step(path), _some(_rows(path))))
        except (OSError, ValueError, LookupError) as error:
            damaged.append(f"`{path.name}` cannot be read ({error}) and is left out.")
    return [at_step for at_step in found if at_step.completions], " ".join(damaged)


def _step(path: Path) -> int:
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else 0


def _rows(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet  # type: ignore[import-untyped]

    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


def _some(rows: Sequence[Mapping[str, Any]]) -> list[Completion]:
    """From the best to the worst, if they are known to be so."""
    ranked = sorted(rows, key=lambda row: -_number(row.get("advantage")))
    if len(ranked) > _SHOWN:
        last = len(ranked) - 1
        ranked = [ranked[round(index * last / (_SHOWN - 1))] for index in range(_SHOWN)]
    return [Completion(_text(row["prompt"]), _text(row["completion"]), list(_facts(row))) for row in ranked]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _facts(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rewards by function, then what else is known."""
    for name, value in row.items():
        if isinstance(value, int | float) and name not in _NOT_A_REWARD:
            yield name, figure(value) if math.isfinite(value) else "none"
    if isinstance(row.get("advantage"), int | float):
        yield "advantage", f"{_number(row['advantage']):+.2f}"
    if row.get("model_version") is not None:
        lag = f", {row['lag']} behind" if row.get("lag") else ""
        yield "version", f"{row['model_version']}{lag}"


def _text(value: Any) -> str:
    """Text as it is; of messages what they say, with their roles if there are several."""
    if isinstance(value, list):
        said = [(str(message.get("role", "")), _content(message.get("content"))) for message in value]
        text = said[0][1] if len(said) == 1 else "\n".join(f"{role}: {content}" for role, content in said)
    else:
        text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."


def _content(content: Any) -> str:
    if isinstance(content, list):  # parts, of which some may be images
        return " ".join(str(part.get("text") or f"[{part.get('type', 'part')}]") for part in content)
    return "" if content is None else str(content)
