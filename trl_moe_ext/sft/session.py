"""The routers of one training run: what they do is read, measured, and turned into losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.passes import forked_rng
from trl_moe_ext.router.routers import Router
from trl_moe_ext.router.trace import Routing
from trl_moe_ext.sft.meter import RouterMeter
from trl_moe_ext.sft.objective import RouterObjective
from trl_moe_ext.sft.options import RouterOptions
from trl_moe_ext.sft.processes import Reduce
from trl_moe_ext.sft.step_counter import StepCounter, statistics_of
from trl_moe_ext.sft.watch import RouterWatch, has_base, kept_tokens, routing_inputs

__all__ = ["RouterSession"]


class RouterSession:
    """Reads the routing beside a trainer's own forward passes.

    Args:
        model: with its adapter, without the wrappers of distributed training.
        routers: of the model.
        options: settled.
        reduce: the sum of a tensor over all processes.

    Raises:
        ConfigError: a loss is unknown, or needs an adapter to compare with.
    """

    def __init__(self, model: nn.Module, routers: Sequence[Router], options: RouterOptions, reduce: Reduce) -> None:
        self.routers = routers
        self.objective = RouterObjective(options.coefficients)
        self._has_base = has_base(model)
        if self.objective.needs_base and not self._has_base:
            raise ConfigError(
                f"{', '.join(self.objective.names)}: a loss needs the routing of the model without its adapter, and "
                "the model has none that can be switched off. Leave it out, or give a peft_config"
            )
        self._options = options
        self._reduce = reduce
        self._model = model
        self._watch = RouterWatch(model, routers)
        self._counter = StepCounter(routers, reduce)
        self._steps = 0  # since the last log
        self._is_measured = options.router_metrics != "off"
        is_full = options.router_metrics == "full"
        self._meters = {
            "train": RouterMeter(routers, self.objective.names, per_layer=is_full),
            "eval": RouterMeter(routers, [], per_layer=is_full),
        }
        # Once for each log: it takes a forward of its own.
        self._drift_is_due = {"train": is_full, "eval": True}

    def begin_step(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """An optimisation step of these micro-batches begins."""
        self._counter.begin(batches)
        self._steps += bool(batches)

    def batch(self, inputs: Mapping[str, Any]) -> AbstractContextManager[list[Routing]]:
        """A list that fills with the routing of the first forward of `inputs` inside."""
        return self._watch.first_pass(kept_tokens(inputs))

    def count_ahead(self, prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> None:
        """Before the first forward of a step: count its micro-batches where a loss needs the counts of all of them.

        The passes see the same dropout as those that will be trained, if the trainer runs the model once a batch.

        Args:
            prepare: puts a micro-batch where the model is.
        """
        counts = self.objective.needs_counts and self._options.router_counts == "exact"
        if counts and self._counter.has_several and not self._counter.is_counted:
            with forked_rng(self._model), torch.no_grad():
                self._counter.count_ahead(lambda inputs: self._route(prepare(inputs)))

    def train(self, seen: Sequence[Routing], inputs: Mapping[str, Any]) -> Tensor | None:
        """Measure a micro-batch that was trained on; returns its share of the router losses, if there are any."""
        statistics = statistics_of(seen)
        if self._is_measured:
            self._meters["train"].add(statistics)
        self._counter.add(statistics)
        base = self._base(inputs, seen, "train", is_needed=self.objective.needs_base)
        if not self.objective:
            return None
        totals = self._counter.totals(statistics, inputs)
        shares = self.objective.shares(seen, totals, base, layers=len(self.routers))
        self._meters["train"].add_losses(shares)
        return sum(shares.values(), torch.zeros(()))

    def step_counts(self) -> dict[str, Tensor]:
        """Label of the router -> ``(E,)`` choices of each expert in the step so far. To be called in every process."""
        return self._counter.counts()

    def evaluate(self, seen: Sequence[Routing], inputs: Mapping[str, Any]) -> None:
        """Measure a batch of an evaluation; its drift, if it is the first."""
        if self._is_measured:
            self._meters["eval"].add(statistics_of(seen))
            self._base(inputs, seen, "eval", is_needed=False)

    def collect(self, mode: str) -> tuple[dict[str, float], dict[str, list[float]]]:
        """What to log since the last log, see `RouterMeter.collect`. To be called in every process."""
        self._drift_is_due[mode] = mode == "eval" or self._options.router_metrics == "full"
        steps = 0
        if mode == "train":
            steps, self._steps = self._steps, 0
        return self._meters[mode].collect(self._reduce, steps)

    def _route(self, inputs: Mapping[str, Any]) -> list[Routing]:
        with self.batch(inputs) as seen:
            self._model(**routing_inputs(self._model, inputs))
        return seen

    def _base(
        self, inputs: Mapping[str, Any], seen: Sequence[Routing], mode: str, is_needed: bool
    ) -> list[Routing] | None:
        """The base routing where a loss needs it or the drift is to be measured, which is once for each log."""
        is_measured = self._is_measured and self._has_base and (is_needed or self._drift_is_due[mode])
        if not (is_needed or is_measured):
            return None
        base = self._watch.base_pass(inputs)
        if is_measured:
            self._meters[mode].add_drift(base, seen)
            self._drift_is_due[mode] = False
        return base
