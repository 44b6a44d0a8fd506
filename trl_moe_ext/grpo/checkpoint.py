"""What a checkpoint keeps of the rollouts: which prompts are done, and the version of the adapter."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.files import write_atomically

__all__ = ["RolloutState", "check_unused", "last_whole_checkpoint"]

logger = logging.getLogger(__name__)

_FILE = "rollout_state.json"
# The last file that transformers writes into a checkpoint.
_LAST_FILE = "trainer_state.json"


@dataclass(frozen=True)
class RolloutState:
    """Of one moment between two steps; samples that were not trained on yet are not in it, and are generated again.

    Attributes:
        model_version: the newest that was published.
        is_published: whether its weights are those of the checkpoint.
        worker: the state of the rollout worker: the prompts that are done, and ``num_done``.
    """

    model_version: int
    is_published: bool
    worker: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write ``rollout_state.json`` into the folder of a checkpoint, which is made if it is not there.

        The folder may hold an older checkpoint of the same step; from here on it is not whole until transformers has
        written all of it anew.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LAST_FILE).unlink(missing_ok=True)
        write_atomically(folder / _FILE, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> RolloutState:
        """What `save` wrote.

        Raises:
            ConfigError: there is no such file, or it is damaged.
        """
        path = folder / _FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise ConfigError(
                f"{folder} has no {_FILE}, so which prompts it has trained on is not known; resume from a checkpoint "
                "of AsyncMoeGRPOTrainer, or start anew"
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is damaged ({error}); resume from another checkpoint") from error


def last_whole_checkpoint(output_dir: Path) -> Path:
    """The newest checkpoint that was written to its end; others, of a process that was killed meanwhile, are named.

    Raises:
        ConfigError: there is none.
    """
    for path in _newest_first(output_dir):
        if _is_whole(path):
            return path
        logger.warning("%s was not written to its end and is left alone; resuming from one before it", path)
    raise ConfigError(
        f"{output_dir} has no checkpoint to resume from; check output_dir, or leave resume_from_checkpoint out"
    )


def check_unused(output_dir: Path) -> None:
    """Refuse a folder for a run that begins anew if the checkpoints of another could be taken for its own.

    One that was not written to its end is in nobody's way: it is never resumed from.

    Raises:
        ConfigError: a whole checkpoint is there.
    """
    found = next((path for path in _newest_first(output_dir) if _is_whole(path)), None)
    if found is not None:
        raise ConfigError(
            f"{output_dir} holds {found.name} of an earlier run, which a later resume could take for one of this run; "
            "set resume_from_checkpoint=True to go on with that run, give another output_dir, or delete its "
            "checkpoints to begin anew"
        )


def _newest_first(output_dir: Path) -> list[Path]:
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in named if match]
    return [path for _, path in sorted(numbered, reverse=True)]


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / _FILE).is_file()
