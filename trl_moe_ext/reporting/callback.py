"""The summary of a run: a table before the first step, the loss curve and the adapter's place after the last."""

from __future__ import annotations

import atexit
import shlex
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from rich.console import Console
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_moe_ext.reporting.adapted import adapted_table
from trl_moe_ext.reporting.loss_curve import save_loss_curve
from trl_moe_ext.reporting.run_record import RECORD_FILE


class RunSummaryCallback(TrainerCallback):  # type: ignore[misc]
    """Prints on the main process only. The last word comes when the script ends, after it has saved the adapter."""

    def __init__(self) -> None:
        # soft_wrap: a path must stay copyable, also where the output is no terminal.
        self.console = Console(soft_wrap=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Show what will be trained before time is spent on it."""
        if state.is_world_process_zero:
            self.console.print(adapted_table(model))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Save the loss curve, and report at the end of the process: the script saves the adapter after this event."""
        if not state.is_world_process_zero:
            return
        output_dir = Path(args.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        curve = output_dir / "loss_curve.png"
        has_curve = save_loss_curve(state.log_history, curve)
        table = adapted_table(model)
        before = _saved_at(output_dir)
        atexit.register(lambda: self._report(table, state, output_dir, curve if has_curve else None, before))

    def _report(
        self, table: Any, state: TrainerState, output_dir: Path, curve: Path | None, before: float | None
    ) -> None:
        self.console.print()
        self.console.print(table)
        self.console.print(_course(state))
        if curve:
            self.console.print(f"Loss curve: {curve}")
        if _saved_at(output_dir) in (None, before):
            self.console.print(f"The adapter was not saved to {output_dir}: the script ended before.", style="red")
            return
        self.console.print(f"Adapter:    {output_dir / SAFETENSORS_WEIGHTS_NAME}")
        place = shlex.quote(str(output_dir))
        self.console.print(f"Next:       trl-moe ask {place} 'your question'")
        if (output_dir / RECORD_FILE).exists():
            self.console.print(f"            trl-moe report {place}")


def _saved_at(output_dir: Path) -> float | None:
    """When the adapter file was written, None if there is none."""
    file = output_dir / SAFETENSORS_WEIGHTS_NAME
    return file.stat().st_mtime if file.exists() else None


def _course(state: TrainerState) -> str:
    """How the run went: by its rewards if it has any, as the loss of a policy says nothing about how good it is."""
    for name in ("rollout/reward", "reward"):
        rewards = _logged(state, name)
        if rewards:
            return f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}"
    parts = []
    for name, label in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        values = _logged(state, name)
        if values:
            parts.append(f"{label} {values[0]:.3f} -> {values[-1]:.3f}")
    return ", ".join(parts) or "No loss was logged."


def _logged(state: TrainerState, name: str) -> list[float]:
    return [row[name] for row in state.log_history if row.get(name) is not None]
