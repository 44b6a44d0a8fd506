"""TRL's `SFTTrainer` with a view of the router, losses on it, and a way to train it.

Everything happens around calls of the parent: its loss is computed by itself, from the batch as it came, and what the
routers did in that forward is read beside it. Without routers, or with all options off, nothing is added
but the record of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from trl_moe_ext.reporting.record_callback import RunRecordCallback
from trl_moe_ext.router.routers import Router
from trl_moe_ext.sft.artefacts import RouterArtefacts
from trl_moe_ext.sft.bias_balancing import BiasBalancing, biases_to_move, warn_of_idle_biases
from trl_moe_ext.sft.options import RouterOptions, check_setup, settle
from trl_moe_ext.sft.session import RouterSession
from trl_moe_ext.sft.trained_router import compute_in_float32, router_parameters, set_learning_rate

__all__ = ["MoeSFTTrainer"]


class MoeSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """Drop-in for `trl.SFTTrainer`; takes the same arguments, with `MoeSFTConfig` for the options of the router.

    Raises:
        ConfigError: an option would have no effect, or cannot be had with this model or setup.
        LayoutError: an option needs the router of experts whose router cannot be told.
    """

    _routers: Sequence[Router] = ()
    _session: RouterSession | None = None  # where something is to be seen of them, or done about them
    _artefacts: RouterArtefacts | None = None

    def __init__(self, model: Any, args: SFTConfig | None = None, *others: Any, **kwargs: Any) -> None:
        coefficient = getattr(args, "router_aux_loss_coef", None)
        if coefficient is not None:
            args.router_aux_loss_coef = 0.0  # type: ignore[union-attr]
        try:
            super().__init__(model, args, *others, **kwargs)
        finally:
            if coefficient is not None:
                args.router_aux_loss_coef = coefficient  # type: ignore[union-attr]
        self._restore_model_config(coefficient)
        self._set_up_routers()
        if not any(isinstance(callback, RunRecordCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(RunRecordCallback)

    # -- the parent's own auxiliary loss -----------------------------------------------------------------------------

    @property
    def router_aux_loss_coef(self) -> float:
        """What the parent multiplies its own loss by, which pools the layers of one micro-batch: always nothing."""
        return 0.0

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, found: float) -> None:
        # With None in the options, the parent tells here what the model's config declares.
        self._declared_coefficient = found

    def _restore_model_config(self, coefficient: float | None) -> None:
        """The parent has put its zero into the model's config, which is saved with the model."""
        text_config = self.model.config.get_text_config()
        if hasattr(text_config, "router_aux_loss_coef"):
            text_config.router_aux_loss_coef = self._declared_coefficient if coefficient is None else coefficient
        if hasattr(text_config, "output_router_logits"):
            text_config.output_router_logits = False  # or the model would compute that loss all the same

    # -- set-up ------------------------------------------------------------------------------------------------------

    def _set_up_routers(self) -> None:
        options, self._routers = settle(RouterOptions.of(self.args), self.model, self._declared_coefficient)
        check_setup(options, self.args, has_optimizer=self.optimizer is not None)
        for router in self._routers:
            if router_parameters([router]):
                compute_in_float32(router)
        is_measured = options.router_metrics != "off"
        rate = options.router_bias_update_rate
        if self._routers and (is_measured or options.losses or rate):
            self._session = RouterSession(self.model, self._routers, options, self._sum_over_processes)
            if rate is None:
                warn_of_idle_biases(self.model)
            elif rate:
                biases_to_move(self.model)  # says now if there are none
                find_biases = partial(biases_to_move, self.model)
                self.add_callback(BiasBalancing(find_biases, self._session.step_counts, rate))
        if self._routers and is_measured:
            callbacks = self.callback_handler.callbacks
            self._artefacts = RouterArtefacts(self.args.output_dir, trackers=callbacks)
            callbacks.insert(0, self._artefacts)  # before the trackers, which close at the end of training

    def _sum_over_processes(self, tensor: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return tensor
        summed: Tensor = self.accelerator.reduce(tensor.to(self.accelerator.device), "sum")
        return summed

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in the parent; the router's parameters get a learning rate of their own if there is one."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        rate = RouterOptions.of(self.args).router_learning_rate
        if is_new and rate is not None:
            set_learning_rate(optimizer, router_parameters(self._routers), rate)
        return optimizer

    # -- a step ------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """As in the parent, which takes all micro-batches of a step at once."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._session is not None:
            self._session.begin_step(batches)
        return batches, num_items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The parent's loss; in training with the router losses, in an evaluation without."""
        session = self._session
        if session is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.model.training:
            session.count_ahead(lambda batch: self._prepare_inputs(dict(batch)))
        batch = dict(inputs)
        with session.batch(batch) as seen:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            session.evaluate(seen, batch)
            return result
        share = session.train(seen, batch)
        if share is None:
            return result
        loss, *outputs = result if return_outputs else (result,)
        loss = loss + self._scale_of_shares(num_items_in_batch) * share.to(loss.device)
        return (loss, *outputs) if return_outputs else loss

    def _scale_of_shares(self, num_items_in_batch: Any) -> int:
        """What the share of a micro-batch is multiplied by, so that all of them add up to the loss of the step.

        Data-parallel training takes the mean over its processes. (Those of tensor parallelism, over which no mean is
        taken, see the same tokens, which were counted once for each of them.) The parent divides what it takes for
        the mean of a micro-batch by their number.
        """
        processes: int = self.accelerator.num_processes
        is_for_the_step = self.loss_is_scaled_for_ga
        if is_for_the_step is None:
            is_counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_for_the_step = is_counted or self.compute_loss_func is not None
        # Outside of the training loop a batch is a step of its own.
        return processes if is_for_the_step else processes * getattr(self, "current_gradient_accumulation_steps", 1)

    # -- what is logged ----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the parent, with the metrics of the routers."""
        if self._session is not None and self._artefacts is not None:
            mode = "train" if self.model.training else "eval"
            metrics, shares = self._session.collect(mode)
            for name, value in metrics.items():
                self._metrics[mode][name].append(value)
            if mode == "train" and shares:
                self._artefacts.add(self.state, shares)
        super().log(logs, start_time)
