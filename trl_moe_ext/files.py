"""Files that are whole or absent: what a killed process leaves behind can be read."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content`, text in UTF-8, to a file beside `path`, and give it the name when it is complete.

    Raises:
        OSError: the directory is missing or cannot be written; `path` is then as it was.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
