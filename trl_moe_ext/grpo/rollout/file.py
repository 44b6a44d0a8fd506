"""OUTPUT_DIR/rollout.json: what generates for this run, for people and for tools that watch it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from trl_moe_ext.files import write_atomically

__all__ = ["ROLLOUT_FILE", "write_rollout_file"]

logger = logging.getLogger(__name__)

ROLLOUT_FILE = "rollout.json"


def write_rollout_file(
    output_dir: str, *, backend: str, pid: int | None, model_version: int | None, restarts: int, state: str
) -> None:
    """Write the file as a whole; a disk that is full is no reason to end a run here, and is logged.

    Args:
        pid: of the process that generates, None if there is none on this machine.
        model_version: of the adapter that it uses, None before the first.
        state: ``starting``, ``running``, ``restarting``, ``stopped`` or ``failed``.
    """
    told = {"pid": pid, "backend": backend, "model_version": model_version, "restarts": restarts, "state": state}
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(output_dir) / ROLLOUT_FILE, json.dumps(told) + "\n")
    except OSError as error:
        logger.warning("%s was not written: %s", Path(output_dir) / ROLLOUT_FILE, error)
