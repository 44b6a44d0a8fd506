"""From the queue of samples to the micro-batches of every process.

TRL hands its plan to an accelerate data loader, which fetches one micro-batch more than it gives: with
``max_staleness=0`` that one would never come, and otherwise it is one step older than it has to be. Here a micro-batch
is taken when it is asked for, and a failure of the main process ends the others too, who would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.grpo.rollout.sample_queue import StopRequested
from trl_moe_ext.grpo.trl_async import TreeRow

__all__ = ["MicroBatches", "TokenBudgetPlanner"]


class TokenBudgetPlanner:
    """Plans micro-batches whose rows hold at most so many tokens, and all of them together so many samples.

    TRL's planner goes by the tokens alone: a step may then need more samples than the generator is allowed to make
    before the next version, and wait for ever.

    That a sample does not fit is only seen once it is taken. It is put back and not kept: the next micro-batch may be
    of the next step, for which it may be too old.

    A group may be cut: its samples may be in several micro-batches, and in two steps. Their advantages stay as they
    are, for they were computed of the whole group before the first was taken. What a cut changes is how much a token
    counts: TRL's loss is the mean over the micro-batches of a step of the means over their tokens, so that tokens
    of a micro-batch that the budget has left nearly empty count for more than those of a full one.

    Args:
        samples: as TRL's packing takes them.
        num_rows: of a micro-batch, one for each process; none is left empty.
        token_budget: of a row: its packed tokens, and its trained tokens. A longer sample has a row for itself.
        max_samples: of a micro-batch; at least `num_rows`.
        put_back: takes the last one of `samples`, to come again or to be replaced.
    """

    def __init__(
        self,
        samples: Iterable[dict[str, Any]],
        num_rows: int,
        token_budget: int,
        max_samples: int,
        put_back: Callable[[dict[str, Any]], None],
    ) -> None:
        assert max_samples >= num_rows, (max_samples, num_rows)
        self._samples, self._put_back = samples, put_back
        self._num_rows, self._token_budget, self._max_samples = num_rows, token_budget, max_samples

    def __iter__(self) -> Iterator[list[TreeRow]]:
        rows = self._empty_rows()
        for sample in self._samples:
            row = self._place(rows, sample)
            if row is None:
                self._put_back(sample)
                yield rows
                rows = self._empty_rows()
                continue
            row.add(sample)
            if sum(len(row.samples) for row in rows) == self._max_samples:
                yield rows
                rows = self._empty_rows()

    def _empty_rows(self) -> list[TreeRow]:
        return [TreeRow() for _ in range(self._num_rows)]

    def _place(self, rows: list[TreeRow], sample: dict[str, Any]) -> TreeRow | None:
        """The row that a sample is cheapest in: one of its group, else the least loaded; None if none has room."""
        empty = [row for row in rows if not row.samples]
        left = self._max_samples - sum(len(row.samples) for row in rows)
        candidates = empty if len(empty) >= left else rows
        fitting = [row for row in candidates if not row.samples or row.fits(sample, self._token_budget)]
        home = [row for row in fitting if sample["group_id"] in row.groups]
        return min(home or fitting, key=lambda row: row.load, default=None)


class MicroBatches:
    """What each process takes its micro-batches from, in step with the others.

    Args:
        plan: of the main process, rows for all processes; None in the others.
        collate: makes tensors of them whose first dimension is the processes.
        check: called by the main process before it waits for the next plan; may raise.
        taken: told by the main process what it gives out, which is trained on in the step to come.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        plan: Iterable[list[TreeRow]] | None,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        check: Callable[[], None],
        taken: Callable[[list[TreeRow]], None],
    ) -> None:
        self._accelerator = accelerator
        self._plan = plan
        self._collate = collate
        self._check = check
        self._taken = taken

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rows = iter(self._plan or ())
        while True:
            yield self._next(rows)

    def _next(self, rows: Iterator[list[TreeRow]]) -> dict[str, Tensor]:
        if self._accelerator.num_processes == 1:
            return self._planned(rows)
        found: list[Any] = [None]
        if self._accelerator.is_main_process:
            try:
                found = [self._planned(rows)]
            except BaseException as error:
                broadcast_object_list([_told(error)], from_process=0)
                raise
        batch = broadcast_object_list(found, from_process=0)[0]
        if isinstance(batch, BaseException):
            raise batch
        rank = self._accelerator.process_index
        return {name: tensor[rank : rank + 1] for name, tensor in batch.items()}

    def _planned(self, rows: Iterator[list[TreeRow]]) -> dict[str, Tensor]:
        self._check()
        planned = next(rows)
        batch = self._collate([planned])
        self._taken(planned)
        return batch


def _told(error: BaseException) -> BaseException:
    """What the other processes are to raise; errors of other libraries may not survive the way to them."""
    if isinstance(error, StopRequested):
        return error
    kind = MoeExtError if isinstance(error, MoeExtError) else RuntimeError
    return kind(f"the main process has no next micro-batch: {type(error).__name__}: {error}")
