"""How the weights of one module of routed experts are laid out, and views of them in the form that kernels take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Literal

from torch import Tensor, nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights


@dataclass(frozen=True)
class Projection:
    """One stack of expert weights.

    Attributes:
        name: of the stack, unique in its module; the factors of an adapter carry it.
        role: ``up`` is the first projection, with a gate its output is gate and up together unless the gate has a
            stack of its own, ``gate``; ``down`` is the second.
        in_features, out_features: of each expert.
        is_transposed: the weights are ``(E, in, out)`` instead of ``(E, out, in)``.
        bias: the parameter of its bias ``(E, out)``, or None.
        path: of the parameter inside the module; `name` if empty.
    """

    name: str
    role: Literal["gate", "up", "down"]
    in_features: int
    out_features: int
    is_transposed: bool = False
    bias: str | None = None
    path: str = ""

    @property
    def word(self) -> str:
        """The user's word for it: ``gate_up`` or ``down``."""
        return "down" if self.role == "down" else "gate_up"

    @property
    def parameter(self) -> str:
        """Path of the parameter inside the module."""
        return self.path or self.name


@dataclass(frozen=True)
class ExpertsLayout:
    """How to read and run one module of routed experts.

    Attributes:
        num_experts: E, read from the parameter: it may differ from layer to layer and from the config.
        projections: the stacks, in the order in which they are applied.
        activation: called with the module and the up projection's output, ``(S, 2I)`` with a gate; returns ``(S, I)``.
            None for a module that is a single projection.
        has_gate: the activation joins a gate and an up projection.
        is_interleaved: gate and up alternate in the up projection's output instead of standing in two halves.
        has_post_norm: the module's ``post_expert_norm`` follows each expert.
        weights_on_input: the routing weights multiply an expert's input instead of its output.
        identity_experts: indices ``E .. E + identity_experts - 1`` name experts that return their token unchanged.
        takes_rows: the module is called with rows that are sorted by expert already, and with the number of rows of
            each expert, instead of tokens, chosen experts and routing weights.
        sparse_block: where the stock block around the experts calls them in another way, the subclass of it that
            calls them with tokens, chosen experts and routing weights. It takes the block's place while the experts
            are adapted.
        read_from: what told the layout: ``interface``, the name of a plug-in's record, or ``structure``, which means
            names and shapes alone: to be compared with the module itself before it is used.
    """

    num_experts: int
    projections: tuple[Projection, ...]
    activation: Callable[[nn.Module, Tensor], Tensor] | None = None
    has_gate: bool = True
    is_interleaved: bool = False
    has_post_norm: bool = False
    weights_on_input: bool = False
    identity_experts: int = 0
    takes_rows: bool = False
    sparse_block: type[nn.Module] | None = None
    read_from: str = "interface"

    @property
    def is_inferred(self) -> bool:
        """Whether nothing but names and shapes told the layout."""
        return self.read_from == "structure"

    def by_role(self, role: str) -> Projection | None:
        """The projection of that role, if there is one."""
        return next((p for p in self.projections if p.role == role), None)

    @property
    def up(self) -> Projection:
        """The first projection."""
        return self._required("up")

    @property
    def down(self) -> Projection:
        """The second projection."""
        return self._required("down")

    def _required(self, role: str) -> Projection:
        projection = self.by_role(role)
        assert projection is not None, f"a layout without a projection {role!r} has no such part to ask for"
        return projection


def stack_of(module: nn.Module, projection: Projection) -> Tensor:
    """The stack as the module stores it."""
    # By attribute and not as a parameter: sharded training puts plain tensors in the place of parameters.
    stack: Tensor = attrgetter(projection.parameter)(module)
    return stack


def weight_view(module: nn.Module, projection: Projection, layout: ExpertsLayout) -> Tensor:
    """The stack as ``(E, in, out)``, a view of the parameter."""
    weight = stack_of(module, projection)
    if weight.ndim == 2:  # all experts one below the other
        weight = weight.view(layout.num_experts, -1, weight.shape[1])
    if weight.shape[0] > layout.num_experts:  # rows that no expert uses
        weight = weight[: layout.num_experts]
    return weight if projection.is_transposed else weight.transpose(1, 2)


def expert_weights(module: nn.Module, layout: ExpertsLayout) -> ExpertsWeights:
    """The frozen weights of `module` in the form that the kernels take. Nothing is copied."""
    assert layout.activation is not None
    gate = layout.by_role("gate")
    return ExpertsWeights(
        up=weight_view(module, layout.up, layout),
        down=weight_view(module, layout.down, layout),
        up_bias=getattr(module, layout.up.bias) if layout.up.bias else None,
        down_bias=getattr(module, layout.down.bias) if layout.down.bias else None,
        activation=partial(layout.activation, module),
        post_norm=module.post_expert_norm if layout.has_post_norm else None,  # type: ignore[arg-type]
        gate=weight_view(module, gate, layout) if gate is not None else None,
        weights_on_input=layout.weights_on_input,
        identity_experts=layout.identity_experts,
    )


def check_dtypes(module: nn.Module, layout: ExpertsLayout) -> ExpertsLayout:
    """Return `layout` if the module's stacks can be adapted.

    Raises:
        LayoutError: a stack is stored in a dtype that cannot be trained on.
    """
    what = type(module).__name__
    for projection in layout.projections:
        stack = stack_of(module, projection)
        if not stack.is_floating_point():
            raise LayoutError(
                f"{what}.{projection.parameter} is stored as {stack.dtype}: quantised experts cannot be adapted yet. "
                "Load the model in bfloat16, or leave the experts out of the quantisation"
            )
    return layout
