"""What a training script of TRL says when it ends in an error that this package raised on purpose."""

from __future__ import annotations

import sys
from types import TracebackType

from trl_moe_ext.errors import AdapterFileError, ConfigError
from trl_moe_ext.hosts.trl import training_script
from trl_moe_ext.hosts.trl_peft_config import in_words_of_the_command

__all__ = ["tell_in_one_line"]


def tell_in_one_line() -> None:
    """Say mistakes in options and adapter files that show after the parse as the parser says those that it finds.

    They are about what was asked for: their place in the code tells a user nothing. Every other error keeps its
    traceback. Only in the process of a training script; a second call does nothing.
    """
    script = training_script()
    shown = sys.excepthook
    if script is None or hasattr(shown, "trl_moe_ext"):
        return

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, ConfigError | AdapterFileError):
            sys.stderr.write(f"trl {script}: error: {in_words_of_the_command(str(error))}\n")
        else:
            shown(kind, error, traceback)

    excepthook.trl_moe_ext = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
