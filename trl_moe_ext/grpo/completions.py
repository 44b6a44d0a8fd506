"""What the policy writes, for people to read: some completions at each log, kept as TRL's `GRPOTrainer` keeps them."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.sample import MoeRolloutSample
from trl_moe_ext.reporting.rollout_files import COMPLETIONS_DIR, COMPLETIONS_FILES

__all__ = ["CompletionsTable"]

_KEPT = 8  # samples of a log, unless the options ask for another number
_MOST_FILES = 200
_MOST_CHARACTERS = 20_000  # of a prompt or a completion
_REWARD = "rewards/"
_COLUMNS = ("step", "prompt", "completion", "advantage", "model_version", "lag")


class CompletionsTable:
    """Completions drawn at random from those between two logs, in ``completions/completions_<step>.parquet``.

    Text is what the model saw and drew, special tokens included. Of a long run every other file is removed, so that
    there are never more than 200. What can't be written is a warning: no reason to lose a run.

    Args:
        output_dir: of the run.
        tokenizer: of the model.
        args: `log_completions` prints them too, `num_completions_to_print` says how many are kept; `seed` chooses.
    """

    def __init__(self, output_dir: str | Path, tokenizer: PreTrainedTokenizerBase, args: AsyncMoeGRPOConfig) -> None:
        self._directory = Path(output_dir) / COMPLETIONS_DIR
        self._tokenizer = tokenizer
        self._is_printed = args.log_completions
        self._size = _KEPT if args.num_completions_to_print is None else args.num_completions_to_print
        self._random = random.Random(args.seed)
        self._kept: list[tuple[MoeRolloutSample, int]] = []
        self._seen = 0

    def add(self, sample: MoeRolloutSample, model_version: int) -> None:
        """Take note of a sample that is trained on; each since the last `flush` is as likely to be kept.

        Args:
            sample: with its rewards in `metrics`.
            model_version: of the trainer.
        """
        self._seen += 1
        if len(self._kept) < self._size:
            self._kept.append((sample, model_version))
        elif (place := self._random.randrange(self._seen)) < self._size:
            self._kept[place] = sample, model_version

    def flush(self, step: int) -> None:
        """Write, and print if that is asked for, what was kept since the last time; nothing if that is nothing."""
        rows = [self._row(sample, version, step) for sample, version in self._kept]
        self._kept, self._seen = [], 0
        if not rows:
            return
        try:
            _write(rows, self._directory / COMPLETIONS_FILES.replace("*", f"{step:05d}"))
            _thin(self._directory)
        except OSError as error:
            warnings.warn(f"{self._directory}: completions were not written: {error}", RuntimeWarning, stacklevel=2)
        if self._is_printed:
            _print(rows, step)

    def _row(self, sample: MoeRolloutSample, model_version: int, step: int) -> dict[str, Any]:
        is_completion = sample.completion_mask.astype(bool)
        # The mask may leave out tokens of a completion, such as those of a tool, but none before its first.
        start = int(is_completion.argmax()) if is_completion.any() else len(is_completion)
        return {
            "step": step,
            "prompt": self._text(sample.input_ids[:start]),
            "completion": self._text(sample.input_ids[start:]),
            **dict(_rewards(sample.metrics)),
            "advantage": float(sample.advantage),
            "model_version": sample.model_version,
            "lag": model_version - sample.model_version,
        }

    def _text(self, ids: Any) -> str:
        text = str(self._tokenizer.decode(ids))
        return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ..."


def _rewards(metrics: dict[str, float]) -> Iterator[tuple[str, float | None]]:
    """By function, named as in TRL's tables; None where there is no reward."""
    for key, value in metrics.items():
        if key.startswith(_REWARD):
            name = key.removeprefix(_REWARD)
            yield key if name in _COLUMNS else name, None if value != value else float(value)


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    """One row group; a killed process leaves the whole file or none.

    Raises:
        OSError: the directory cannot be written.
    """
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        parquet.write_table(table, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _thin(directory: Path) -> None:
    """Leave out every other file of too many, but never the first and the last."""
    files = sorted(directory.glob(COMPLETIONS_FILES), key=lambda path: (len(path.name), path.name))
    if len(files) > _MOST_FILES:
        for path in files[1:-1:2]:
            path.unlink(missing_ok=True)


def _print(rows: list[dict[str, Any]], step: int) -> None:
    from trl.trainer.utils import print_prompt_completions_sample

    rewards = {name: [row.get(name) for row in rows] for name in rows[0] if name not in _COLUMNS}
    print_prompt_completions_sample(
        [row["prompt"] for row in rows],
        [row["completion"] for row in rows],
        {name: [float("nan") if v is None else v for v in values] for name, values in rewards.items()},
        [row["advantage"] for row in rows],
        step,
        extra={"version": [row["model_version"] for row in rows], "lag": [row["lag"] for row in rows]},
    )
