"""Run a command that gets SIGTERM when the process that started it dies, however it dies.

    python die_with_parent.py PARENT COMMAND...

It is run as a file, with nothing of the package imported, and becomes the command. Where the system has no such signal
(it is Linux's), the command just runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


def main() -> None:
    """Ask for the signal, and become the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        # The system means the thread that started us: it also ends us when that thread ends before its process.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before we asked
            sys.exit("the process that started this one is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
