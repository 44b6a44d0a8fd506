"""Whether a router loss is added to the loss of a run, and trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sft.runs import logged, sft, train
from tests.tolerances import RELATIVE_ERROR

COEFFICIENT = 0.5


def assert_added(folder: Path, *, accepts_loss_kwargs: bool = True, reached: str = ".gate.", **options: Any) -> None:
    """The loss is greater by the coefficient times the value that is logged without it, and gradients are others.

    Args:
        folder: of the output.
        accepts_loss_kwargs: whether the model lets the parent count the labels of the whole step.
        reached: part of the names of parameters whose gradients must be others.
        options: of the run.
    """

    def run(coefficient: float) -> Any:
        torch.manual_seed(0)
        trainer = sft(folder, max_steps=2, router_aux_loss_coef=coefficient, router_metrics="summary", **options)
        trainer.model_accepts_loss_kwargs &= accepts_loss_kwargs
        return trainer, *train(trainer)

    trainer, losses, gradients = run(0.0)
    with_it, total, other = run(COEFFICIENT)
    values = logged(trainer, "router/aux_loss")
    assert len(losses) == len(total) == len(values) == 2
    for loss, sum_, value in zip(losses, total, values, strict=True):
        assert sum_ - loss == pytest.approx(COEFFICIENT * value, rel=RELATIVE_ERROR[torch.float32][0])
    assert logged(with_it, "router/loss/load_balancing") == pytest.approx([COEFFICIENT * value for value in values])
    for before, after in zip(gradients, other, strict=True):
        assert before.keys() == after.keys()
        changes = [(after[name] - before[name]).norm() / before[name].norm() for name in before if reached in name]
        assert max(changes) > 0.01  # infinite for what has no gradient from the other loss
    keys = {key for row in with_it.state.log_history for key in row}
    assert not keys & {"aux_loss", "eval_aux_loss"}, "the parent's own loss ran"
