"""Read the flags of transformers' experts interface, which say how a module of stacked experts is laid out."""

from __future__ import annotations

from torch import Tensor, nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts.layout import ExpertsLayout, Projection

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


def read_interface(module: nn.Module) -> ExpertsLayout | None:
    """The layout of a module whose class is decorated with ``use_experts_implementation``, else None."""
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return None
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, up_name, None), getattr(module, "down_proj", None)
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or {up.ndim, down.ndim} != {3}:
        return None
    if up.shape[0] != down.shape[0]:
        raise LayoutError(
            f"{type(module).__name__} should hold two stacks of the same number of experts; found {up_name} "
            f"{tuple(up.shape)} and down_proj {tuple(down.shape)}"
        )
    is_transposed = bool(module.is_transposed)
    in_axis, out_axis = (1, 2) if is_transposed else (2, 1)
    return ExpertsLayout(
        num_experts=down.shape[0],
        projections=(
            Projection(
                up_name, "up", up.shape[in_axis], up.shape[out_axis], is_transposed, _bias_name(module, up_name)
            ),
            Projection(
                "down_proj",
                "down",
                down.shape[in_axis],
                down.shape[out_axis],
                is_transposed,
                _bias_name(module, "down_proj"),
            ),
        ),
        activation=apply_gate if module.has_gate else apply_act_fn,
        has_gate=bool(module.has_gate),
        is_interleaved=not module.is_concatenated,
        has_post_norm=bool(module.has_post_expert_norm),
    )


def apply_gate(module: nn.Module, gate_up: Tensor) -> Tensor:
    """The module's own gate."""
    out: Tensor = module._apply_gate(gate_up)  # type: ignore[operator]
    return out


def apply_act_fn(module: nn.Module, up: Tensor) -> Tensor:
    """The module's activation, where there is no gate."""
    out: Tensor = module.act_fn(up)  # type: ignore[operator]
    return out


def _bias_name(module: nn.Module, projection: str) -> str | None:
    return f"{projection}_bias" if module.has_bias else None
