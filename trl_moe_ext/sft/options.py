"""The router options of a run, settled for its model: what is wanted, what it needs, what has no effect."""

from __future__ import annotations

import logging
import warnings
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from accelerate import PartialState
from torch import nn

from trl_moe_ext.errors import ConfigError, LayoutError
from trl_moe_ext.router.routers import Router, find_routers
from trl_moe_ext.sft.config import ROUTER_OPTIONS, MoeSFTConfig
from trl_moe_ext.sft.trained_router import router_parameters

__all__ = ["RouterOptions", "check_setup", "settle"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RouterOptions:
    """The options of `MoeSFTConfig`, also where a plain `SFTConfig` was given; see there.

    Attributes:
        router_aux_loss_coef: None until `settle` has put a number there.
    """

    router_aux_loss_coef: float | None
    router_losses: dict[str, float] | None
    router_bias_update_rate: float | None
    router_learning_rate: float | None
    router_counts: str
    router_metrics: str

    @classmethod
    def of(cls, args: Any) -> RouterOptions:
        """The options that `args` has, and the defaults of the others."""
        defaults = {option.name: option.default for option in fields(MoeSFTConfig) if option.default is not MISSING}
        names = ("router_aux_loss_coef", *ROUTER_OPTIONS)
        return cls(**{name: getattr(args, name, defaults[name]) for name in names})

    @property
    def asked(self) -> list[str]:
        """Options that change what is trained, as they were given."""
        names = ("router_aux_loss_coef", "router_losses", "router_bias_update_rate", "router_learning_rate")
        given = [(name, getattr(self, name)) for name in names]
        # A coefficient of zero is the way to switch a loss off; a learning rate of zero is one.
        return [f"{n}={v!r}" for n, v in given if v or (n == "router_learning_rate" and v is not None)]

    @property
    def coefficients(self) -> dict[str, float]:
        """Name of a router loss -> coefficient."""
        return {"load_balancing": self.router_aux_loss_coef or 0.0, **(self.router_losses or {})}

    @property
    def losses(self) -> list[str]:
        """Names of the losses that are added: their coefficient is not zero."""
        return [name for name, coefficient in self.coefficients.items() if coefficient]


def settle(
    options: RouterOptions, model: nn.Module, declared_coefficient: float
) -> tuple[RouterOptions, list[Router]]:
    """The options with every default in place, and the model's routers; none if it is dense or they cannot be told.

    Args:
        options: as given.
        model: with its adapter.
        declared_coefficient: of load balancing, by the model's config.

    Raises:
        ConfigError: an option would have no effect.
        LayoutError: a router cannot be told, and an option needs it.
    """
    try:
        routers = find_routers(model)
    except LayoutError as error:
        if options.asked:
            raise
        if options.router_metrics != "off":
            warnings.warn(f"router metrics are off: {error}", RuntimeWarning, stacklevel=2)
        return options, []
    if not routers:
        if options.asked:
            raise ConfigError(f"{', '.join(options.asked)}: no effect, because the model has no router. Leave it out")
        return options, []
    is_trained = bool(router_parameters(routers))
    if options.router_learning_rate is not None and not is_trained:
        raise ConfigError(
            "router_learning_rate has no effect: the router is frozen. Use MoeLoraConfig(router_mode='lora') or "
            "'full', on the command line --router_mode; with moe_esft, name the routers in modules_to_save. Or leave "
            "it out"
        )
    return replace(options, router_aux_loss_coef=_coefficient(options, declared_coefficient, is_trained)), routers


def _coefficient(options: RouterOptions, declared: float, is_trained: bool) -> float:
    """Of load balancing: what was given, else what suits a router that is trained or not."""
    if options.router_aux_loss_coef is not None:
        return options.router_aux_loss_coef
    if is_trained:
        return declared
    if declared and PartialState().is_main_process:
        is_logged = " Its value is logged all the same." if options.router_metrics != "off" else ""
        logger.warning(
            "The router is frozen, so router_aux_loss_coef is 0.0 and not the %s of the model's config: a loss on the "
            "balance of the experts would only push the layers before the router.%s Give a coefficient to add it.",
            declared,
            is_logged,
        )
    return 0.0


def check_setup(options: RouterOptions, args: Any, has_optimizer: bool) -> None:
    """That settled options can be had in this way of training, before the first step.

    Args:
        options: settled.
        args: all options of the trainer.
        has_optimizer: whether the trainer was given one.

    Raises:
        ConfigError: an option would have no effect.
    """
    if options.router_learning_rate is not None and has_optimizer:
        raise ConfigError(
            "router_learning_rate has no effect on an optimizer that is given to the trainer. Give the router's "
            "parameters a group with their own rate there, or let the trainer make the optimizer"
        )
    if (options.losses or options.router_bias_update_rate) and args.n_gpu > 1:
        raise ConfigError(
            "router losses and balancing need one process for each GPU: start with `trl sft`, `accelerate launch` or "
            "`torchrun`, or show one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )
    is_reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant", False)
    if options.losses and args.gradient_checkpointing and is_reentrant:
        raise ConfigError(
            f"{', '.join(options.losses)}: under reentrant gradient checkpointing no gradient flows from the routing, "
            "and a loss on it would train nothing. Use gradient_checkpointing_kwargs={'use_reentrant': False}, or no "
            "router loss and router_aux_loss_coef=0.0, which is not the default where the router is trained"
        )
