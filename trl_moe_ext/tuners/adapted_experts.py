"""What every tuner's layer around a module of routed experts does: read it, and be called in its place."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from trl_moe_ext.errors import LayoutError
from trl_moe_ext.experts.gates import recognise_gate
from trl_moe_ext.experts.layout import ExpertsLayout, check_dtypes, expert_weights, stack_of
from trl_moe_ext.experts.probe import check_reading
from trl_moe_ext.experts.reading import read_layout
from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.tuners.merging import MergesDeltas


class AdaptedExperts(nn.Module, MergesDeltas):
    """Wraps a module of routed experts; called with the same arguments, it returns the same ``(T, H)`` tensor.

    A tuner's layer derives from it (first, where it has other bases) and says which adapters it holds, how the active
    ones change the output, and what each would add to the frozen weights.

    Attributes:
        layout: how the wrapped module stores its experts.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        layout = read_layout(base_layer)
        if layout is None:
            raise LayoutError(f"{type(base_layer).__name__} is not a module of routed experts that can be read")
        check_dtypes(base_layer, layout)
        check_reading(base_layer, layout)
        self.layout: ExpertsLayout = layout
        self._closed_form = recognise_gate(base_layer, layout)
        # Families call the three arguments differently, and some pass them by keyword.
        self._argument_names = tuple(inspect.signature(base_layer.forward).parameters)[:3]

    def __getattr__(self, name: str) -> Any:
        # The surrounding block may read `num_experts` or a weight from its experts module; hooks and other private
        # state belong to the wrapper or to the wrapped module, never to both.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    # -- what a tuner says -------------------------------------------------------------------------------------------

    @abstractmethod
    def _run(self, adapters: list[str], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The output with these adapters, of which there may be none, in the shape of `hidden_states`."""

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the wrapped module: ``(T, H)`` tokens, ``(T, K)`` chosen experts and ``(T, K)`` weights to ``(T, H)``."""
        self.refuse_mixed_batch(kwargs)
        adapters = self.adapters_to_apply()
        if not adapters and self.layout.sparse_block is None:
            out: Tensor = self.base_layer(*args, **kwargs)
            return out
        arguments = [*args, *(kwargs.pop(name) for name in self._argument_names[len(args) :] if name in kwargs)]
        if kwargs or len(arguments) > 3:
            raise LayoutError(
                f"{type(self.get_base_layer()).__name__} was called with {sorted(kwargs) or len(arguments)} besides "
                f"{', '.join(self._argument_names)}: what that changes is not known. Describe the family in a plug-in "
                "(hook register_experts_families, see docs/families.md)"
            )
        self._check_device(arguments[0])
        return self._run(adapters, *arguments)

    def frozen_weights(self) -> ExpertsWeights:
        """The frozen weights in the form that kernels take, and what the module computes between them."""
        return expert_weights(self.get_base_layer(), self.layout)._replace(closed_form=self._closed_form)

    def _frozen_stack(self) -> Tensor:
        return stack_of(self.get_base_layer(), self.layout.projections[-1])

    def _check_device(self, hidden_states: Tensor) -> None:
        # Hooks that bring offloaded weights in run when a module is called; the kernel takes the weights themselves.
        weight = self._frozen_stack()
        if weight.device != hidden_states.device:
            raise LayoutError(
                f"the experts are on {weight.device} and their tokens on {hidden_states.device}: offloaded experts "
                "cannot be adapted yet. Load the model without offloading, or leave 'experts' out of moe_target"
            )

    def __repr__(self) -> str:
        return "moe_" + super().__repr__()
