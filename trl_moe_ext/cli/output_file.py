"""Files that a command writes when its work is done."""

from __future__ import annotations

from pathlib import Path

from trl_moe_ext.errors import ConfigError

__all__ = ["check_writable"]


def check_writable(path: str | Path | None) -> None:
    """Refuse, before the work, a file that could not be written after it.

    Args:
        path: None for no file.

    Raises:
        ConfigError: it is a directory, or in none that there is.
    """
    if path is None:
        return
    if Path(path).is_dir():
        raise ConfigError(f"{path} is a directory; give the name of a file")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{Path(path).absolute().parent} is not a directory: {path} cannot be written")
