"""A generator's process whose model fails in the middle of generation, as the variable GENERATOR_FAILS_WITH says."""

from __future__ import annotations

import os
from typing import Any

from trl_moe_ext.grpo.backends.local import process as local_process
from trl_moe_ext.grpo.backends.local.engine import LocalEngine

ERRORS = {
    "memory": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "other": lambda: ValueError("something else"),
}


class FailingEngine(LocalEngine):
    """Fails at the fifth forward."""

    def __init__(self, *arguments: Any) -> None:
        self._left = 5
        super().__init__(*arguments)

    def _after_forward(self, *arguments: Any) -> None:
        self._left -= 1
        if not self._left:
            raise ERRORS[os.environ["GENERATOR_FAILS_WITH"]]()
        super()._after_forward(*arguments)


if __name__ == "__main__":
    local_process.main(FailingEngine)
