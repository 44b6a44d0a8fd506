"""A generator's process that never comes to an end of loading its model, and does not listen to SIGTERM meanwhile."""

from __future__ import annotations

import signal
import time
from typing import Any

from trl_moe_ext.grpo.backends.local import process as local_process


def load_for_ever(*arguments: Any) -> Any:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


if __name__ == "__main__":
    local_process.main(load_for_ever)
