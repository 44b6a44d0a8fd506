"""Read from a module of routed experts how its weights are laid out. No model is named here.

transformers keeps all experts of a layer in one module with stacked 3-D parameters and, where the class is decorated
with `use_experts_implementation`, flags that say how to read them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights

_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class Projection:
    """One stack of expert weights.

    Attributes:
        name: the parameter, ``(E, out, in)`` or, transposed, ``(E, in, out)``.
        bias: the parameter of its bias ``(E, out)``, or None.
        in_features, out_features: of each expert.
    """

    name: str
    bias: str | None
    in_features: int
    out_features: int


@dataclass(frozen=True)
class ExpertsLayout:
    """How to read one module of routed experts.

    Attributes:
        num_experts: E, read from the parameter: it may differ from layer to layer and from the config.
        up: the first projection; with a gate its output is gate and up together.
        down: the second projection.
        is_transposed: the weights are ``(E, in, out)``.
        has_gate: the up projection's output goes through the module's ``_apply_gate``, else through its ``act_fn``.
        is_interleaved: gate and up alternate in the up projection's output instead of standing in two halves.
        has_post_norm: the module's ``post_expert_norm`` follows each expert.
    """

    num_experts: int
    up: Projection
    down: Projection
    is_transposed: bool
    has_gate: bool
    is_interleaved: bool
    has_post_norm: bool

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """Up, then down."""
        return self.up, self.down


def read_layout(module: nn.Module) -> ExpertsLayout | None:
    """The layout of `module`, or None if it is not a module of routed experts.

    Raises:
        LayoutError: the module says that it is one, but its parameters do not fit together.
    """
    if not all(hasattr(module, flag) for flag in _FLAGS) or not hasattr(module, "down_proj"):
        return None
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, up_name, None), module.down_proj
    if not isinstance(up, Tensor) or not isinstance(down, Tensor):
        return None
    _check_stacks(module, up_name, up, down)
    is_transposed = bool(module.is_transposed)
    in_axis, out_axis = (1, 2) if is_transposed else (2, 1)
    return ExpertsLayout(
        num_experts=up.shape[0],
        up=Projection(up_name, _bias_name(module, up_name), up.shape[in_axis], up.shape[out_axis]),
        down=Projection("down_proj", _bias_name(module, "down_proj"), down.shape[in_axis], down.shape[out_axis]),
        is_transposed=is_transposed,
        has_gate=bool(module.has_gate),
        is_interleaved=not module.is_concatenated,
        has_post_norm=bool(module.has_post_expert_norm),
    )


def weight_view(module: nn.Module, projection: Projection, layout: ExpertsLayout) -> Tensor:
    """The stack as ``(E, in, out)``, a view of the parameter."""
    weight: Tensor = getattr(module, projection.name)
    return weight if layout.is_transposed else weight.transpose(1, 2)


def expert_weights(module: nn.Module, layout: ExpertsLayout) -> ExpertsWeights:
    """The frozen weights of `module` in the form that the kernels take. Nothing is copied."""
    return ExpertsWeights(
        up=weight_view(module, layout.up, layout),
        down=weight_view(module, layout.down, layout),
        up_bias=getattr(module, layout.up.bias) if layout.up.bias else None,
        down_bias=getattr(module, layout.down.bias) if layout.down.bias else None,
        activation=module._apply_gate if layout.has_gate else module.act_fn,  # type: ignore[arg-type]
        post_norm=module.post_expert_norm if layout.has_post_norm else None,  # type: ignore[arg-type]
    )


def _bias_name(module: nn.Module, projection: str) -> str | None:
    return f"{projection}_bias" if module.has_bias else None


def _check_stacks(module: nn.Module, up_name: str, up: Tensor, down: Tensor) -> None:
    what = type(module).__name__
    if up.ndim != 3 or down.ndim != 3 or up.shape[0] != down.shape[0]:
        raise LayoutError(
            f"{what} should hold two stacks of the same number of experts; found {up_name} {tuple(up.shape)} and "
            f"down_proj {tuple(down.shape)}"
        )
    for name, stack in ((up_name, up), ("down_proj", down)):
        if not stack.is_floating_point():
            raise LayoutError(
                f"{what}.{name} is stored as {stack.dtype}: quantised experts cannot be adapted yet. Load the model "
                "in bfloat16, or leave the experts out of the quantisation"
            )
