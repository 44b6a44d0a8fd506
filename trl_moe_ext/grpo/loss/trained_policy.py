"""The loss of the async GRPO trainer and its figures: TRL's own without a correction, else those of `objective`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.grpo.batches.packing import PackedRow, made_up_batch
from trl_moe_ext.grpo.config import AsyncMoeGRPOConfig
from trl_moe_ext.grpo.loss.importance import ImportanceCorrection
from trl_moe_ext.grpo.loss.objective import mean_of_step, policy_loss
from trl_moe_ext.grpo.loss.policy_meter import PolicyMeter
from trl_moe_ext.grpo.loss.step_replay import StepReplay
from trl_moe_ext.grpo.trl_async import AsyncGRPOTrainer
from trl_moe_ext.router.routers import Router, find_routers

__all__ = ["TrainedPolicy"]

_PROBE_TOKENS = 8


class TrainedPolicy(AsyncGRPOTrainer):  # type: ignore[misc]
    """The part of `AsyncMoeGRPOTrainer` that is between a micro-batch and its gradients."""

    args: AsyncMoeGRPOConfig
    _correction: ImportanceCorrection | None
    _meter: PolicyMeter
    _step_replay: StepReplay

    def _set_up_loss(self) -> None:
        """To be called when there is a model.

        Raises:
            ConfigError: routes are to be replayed, and the model has no router.
            LayoutError: they are, and its routers can't be told or replayed.
        """
        self._correction = self.args.correction
        self._meter = PolicyMeter(self.accelerator.gather)
        routers = self._find_routers()
        self._settle_auxiliary_loss(routers)
        self._step_replay = StepReplay(routers, self.args.routing_replay, self._total)
        self._check_replay()

    def _find_routers(self) -> list[Router]:
        """Those of the policy; none if they can't be told, and nobody asked for their routes."""
        try:
            return find_routers(self._policy)
        except LayoutError:
            if self.args.routing_replay:
                raise
            return []

    def _settle_auxiliary_loss(self, routers: list[Router]) -> None:
        """Without a coefficient of the user's, balance is a matter of a router that is trained, as in `MoeSFTTrainer`.

        The coefficient of the model's config would otherwise pull at the adapters for the sake of a router that stays
        as it is.
        """
        is_trained = any(p.requires_grad for router in routers for p in router.module.parameters())
        if self.args.router_aux_loss_coef is None and not is_trained:
            self.aux_loss_enabled = False

    def _check_replay(self) -> None:
        """Refuse a model whose routes can't be replayed, by a forward of a few tokens."""
        if not self.args.routing_replay or self.is_fsdp_enabled:  # a model that is to be sharded can't run yet
            return
        batch = self._prepare_inputs(made_up_batch(_PROBE_TOKENS, self.processing_class.pad_token_id))
        was_training = self.model.training
        self.model.eval()
        with self.compute_loss_context_manager():
            self._step_replay.check(lambda: self._forward(self.model, PackedRow.of(batch)), _PROBE_TOKENS)
        self.model.train(was_training)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in the parent; recorded routes hold until its backward pass is over."""
        with self._step_replay.around(inputs, self.accelerator.device):
            batch = {name: value for name, value in inputs.items() if name != "routes"}
            loss: Tensor = super().training_step(model, batch, num_items_in_batch)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The parent's loss without a correction, else that of `objective`."""
        if self._correction is None:
            plain: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return plain
        row = PackedRow.of(inputs)
        began = time.perf_counter()
        outputs = self._forward(model, row)
        self._last_forward_time_s = time.perf_counter() - began
        log_probs, entropy = (values.flatten()[row.token_index] for values in (outputs.log_probs, outputs.entropy))
        everything = torch.ones_like(log_probs, dtype=torch.bool)
        corrected = self._correction.correct(log_probs, row.old_log_probs, everything, row.sequence)
        loss = mean_of_step(
            policy_loss(log_probs, row.advantages, corrected),
            inputs["global_n_tokens"][0],
            self.accelerator.num_processes,
            self.current_gradient_accumulation_steps,
        )
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
            mean = self.accelerator.reduce(outputs.aux_loss.detach().float(), "mean")
            self._metrics["train"]["aux_loss"].append(mean.item())
        self._meter.add(log_probs.detach(), row.old_log_probs, entropy.detach(), corrected.statistics)
        self._account(inputs)
        return loss

    def _forward(self, model: nn.Module, row: PackedRow) -> Any:
        """Log-probabilities and entropies of the packed positions, by TRL's fused output layer."""
        wanted = {"output_router_logits": True} if self.aux_loss_enabled else {}
        return model(fused_lm_head=True, **wanted, **row.arguments)

    def _account(self, inputs: dict[str, Any]) -> None:
        """What the parent's `_log_step_metrics` makes its figures of, which its own loss adds up."""
        forwarded, mean_length = float(inputs["global_n_forward_tokens"][0]), float(inputs["mean_seq_len"][0])
        self._step_forward_tokens += forwarded
        self._step_trained_tokens += float(inputs["global_n_tokens"][0])
        self._step_seq_len_weighted += mean_length * forwarded
        self._step_samples += forwarded / mean_length
        self._step_forward_s += self._last_forward_time_s

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the parent, with the statistics of the weights and of the routes."""
        for name, value in (self._meter.take() | self._step_replay.take_metrics()).items():
            self._metrics["train"][name].append(value)
        super().log(logs, start_time)
