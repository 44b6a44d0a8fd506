"""Options of `MoeSFTTrainer`: TRL's `SFTConfig` and what concerns the router."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from trl_moe_ext.errors import ConfigError, near_matches
from trl_moe_ext.plugins import host

__all__ = ["COUNTS_WORDS", "METRICS_WORDS", "ROUTER_OPTIONS", "MoeSFTConfig"]

METRICS_WORDS = ("off", "summary", "full")
COUNTS_WORDS = ("exact", "running")
# What this config has and `SFTConfig` has not.
ROUTER_OPTIONS = (
    "router_losses",
    "router_bias_update_rate",
    "router_learning_rate",
    "router_counts",
    "router_metrics",
)
_EXAMPLE = "write '{\"z_loss\": 0.001}'"


@dataclass
class MoeSFTConfig(SFTConfig):  # type: ignore[misc]
    """`trl.SFTConfig` with options for the router. Whether the router is trained is said in `MoeLoraConfig`.

    Args:
        router_aux_loss_coef: TRL's option, for another loss: the load balance of each layer over the global batch
            (all micro-batches of a step on all processes), mean over the layers. TRL's own loss, which pools the
            layers and looks at one micro-batch, never runs. None is 0.0 where the router is frozen, else the value
            that the model's config has.
        router_losses: name of a router loss -> coefficient, see ``trl-moe plugins``: ``z_loss``, ``drift_kl``, or one
            of a plug-in. On the command line in JSON: ``'{"z_loss": 0.001}'``.
        router_bias_update_rate: balancing without a loss: how far the biases that take part in the choice of experts
            only are moved in each step. Needs ``MoeLoraConfig(router_bias=True)``.
        router_learning_rate: of the router's parameters; `learning_rate` if None.
        router_counts: how load balancing counts under gradient accumulation. ``exact`` counts the experts of the whole
            step before its first backward, which takes one forward more of each micro-batch; ``running`` uses what it
            has seen of the step so far, at no cost. Without accumulation both are the same.
        router_metrics: ``summary`` logs a few numbers for all layers together, ``full`` those of each layer too and
            the drift from the base routing at every log, ``off`` nothing.

    Raises:
        ConfigError: an option is unknown or out of range.
    """

    router_losses: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "moe_lora, moe_esft: router losses and their coefficients, as JSON or a YAML mapping: "
            "'{\"z_loss\": 0.001}'. `trl-moe plugins` lists the losses; load balancing is --router_aux_loss_coef."
        },
    )
    router_bias_update_rate: float | None = field(
        default=None,
        metadata={
            "help": "moe_lora: balance the experts without a loss: how far the biases that choose experts move in "
            "each step, such as 0.001. Needs --moe_router_bias."
        },
    )
    router_learning_rate: float | None = field(
        default=None,
        metadata={"help": "moe_lora, moe_esft: learning rate of a trained router; --learning_rate if not given."},
    )
    router_counts: str = field(
        default="exact",
        metadata={
            "help": "moe_lora, moe_esft: under gradient accumulation load balancing counts the experts of the whole "
            "step before its first backward ('exact', one more forward), or those seen so far ('running').",
            "metavar": "{" + ",".join(COUNTS_WORDS) + "}",
        },
    )
    router_metrics: str = field(
        default="summary",
        metadata={
            "help": "moe_lora, moe_esft: what is logged of the router: 'summary', 'full' (each layer, and drift at "
            "every log), or 'off'.",
            "metavar": "{" + ",".join(METRICS_WORDS) + "}",
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_word("router_metrics", self.router_metrics, METRICS_WORDS)
        _check_word("router_counts", self.router_counts, COUNTS_WORDS)
        for name in ("router_aux_loss_coef", "router_bias_update_rate", "router_learning_rate"):
            value = getattr(self, name)
            if value is not None and not _is_coefficient(value):
                raise ConfigError(f"{name}={value!r} is not a number of at least 0")
        self.router_losses = _checked_losses(self.router_losses)


def _checked_losses(losses: Any) -> dict[str, float] | None:
    if losses is None:
        return None
    if isinstance(losses, str):
        losses = _from_json(losses)
    if not isinstance(losses, dict):
        raise ConfigError(f"router_losses={losses!r} is not a mapping of names to coefficients; {_EXAMPLE}")
    return {name: _checked_coefficient(name, coefficient) for name, coefficient in losses.items()}


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"router_losses={text!r} is not JSON ({error}); {_EXAMPLE}") from error


def _checked_coefficient(name: Any, value: Any) -> float:
    if name == "load_balancing":
        raise ConfigError("router_losses: load_balancing has an option of its own; use router_aux_loss_coef")
    host().lookup("register_router_losses", name)
    # YAML takes 1e-3, which has no point, for a string.
    coefficient = _number(value) if isinstance(value, str) else value
    if not _is_coefficient(coefficient):
        raise ConfigError(f"router_losses: the coefficient of {name} is {value!r}; use a number from 0")
    return float(coefficient)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _check_word(option: str, word: Any, known: tuple[str, ...]) -> None:
    if word not in known:
        raise ConfigError(f"{option}={word!r} is unknown; {near_matches(str(word), known)}")


def _is_coefficient(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
