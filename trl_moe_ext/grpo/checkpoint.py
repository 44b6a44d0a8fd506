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

__all__ = ["RolloutState", "last_whole_checkpoint"]

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
        """Write ``rollout_state.json`` into the folder of a checkpoint, which is made if it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
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
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("checkpoint-*")]
    numbered = [(int(match[1]), path) for match, path in named if match]
    for _, path in sorted(numbered, reverse=True):
        if _is_whole(path):
            return path
        logger.warning("%s was not written to its end and is left alone; resuming from one before it", path)
    raise ConfigError(
        f"{output_dir} has no checkpoint to resume from; check output_dir, or leave resume_from_checkpoint out"
    )


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / _LAST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / _FILE).is_file()
