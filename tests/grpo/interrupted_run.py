"""A run in a process of its own, which tells how far it is, for others to interrupt: ``FOLDER MODE MAX_STEPS``.

In the mode ``waiting`` the generator makes no more samples than two steps need; in ``training`` the third step takes
long; in ``free`` nothing is in the way. It resumes if there is a checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from transformers import TrainerCallback

from tests.grpo.fakes import FakeBackend
from tests.grpo.trainer_runs import draw, make_trainer
from trl_moe_ext.grpo.adapter_snapshot import AdapterSnapshot
from trl_moe_ext.grpo.backends.protocol import Generation


class ChildBackend(FakeBackend):
    """A fake that has a child, which ends when it is told to and not by itself."""

    def __init__(self, folder: Path, most: int | None) -> None:
        super().__init__(complete=draw)
        self._folder, self._most, self._made = folder, most, 0
        self._child: subprocess.Popen[bytes] | None = None

    def start(self, adapter: AdapterSnapshot) -> None:
        super().start(adapter)
        self._child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (self._folder / "child").write_text(str(self._child.pid))

    def collect(self, timeout: float) -> list[Generation]:
        if self._most is not None and self._made >= self._most:
            self.hold = True
        found = super().collect(timeout)
        self._made += len(found)
        return found

    def stop(self) -> None:
        super().stop()
        if self._child is not None:
            self._child.kill()
            self._child.wait()


class Progress(TrainerCallback):
    """Says so when two steps are done, and when the third is under way."""

    def __init__(self, folder: Path, is_slow: bool) -> None:
        self._folder, self._is_slow = folder, is_slow

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 2 and self._is_slow:
            (self._folder / "in the third step").touch()
            time.sleep(1.5)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            (self._folder / "two steps").touch()
        with (self._folder / "steps").open("a") as file:
            file.write(f"{state.global_step}\n")


def main(folder: Path, mode: str, max_steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output"
    trainer = make_trainer(
        output,
        ChildBackend(folder, 16 if mode == "waiting" else None),
        max_steps=max_steps,
        max_staleness=0,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=1 if mode in ("killed", "free") else 100,
        callbacks=[Progress(folder, mode in ("training", "killed"))],
    )
    trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")))
    torch.save(get_peft_model_state_dict(trainer.model), folder / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
