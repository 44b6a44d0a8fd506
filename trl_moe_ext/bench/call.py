"""One call of a kernel, and its output and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trl_moe_ext.kernels.experts_mlp import ExpertsWeights
from trl_moe_ext.kernels.low_rank import Updates


@dataclass
class Call:
    """The arguments of a kernel, and a gradient of its output ``(T, H)``."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    weights: ExpertsWeights
    up: Updates
    down: Updates
    grad: Tensor
    gate: Updates = ()

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Whatever has a gradient, by name; the factors are ``up[0].A`` and so on."""
        named = {"hidden_states": self.hidden_states, "top_k_weights": self.top_k_weights}
        for role, updates in self._updates().items():
            for number, update in enumerate(updates):
                named |= {f"{role}[{number}].A": update.A, f"{role}[{number}].B": update.B}
        return named

    def run(self, kernel: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The output, and the gradients of all `leaves`; None for one that is missing."""
        leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in self.leaves.items()}
        updates = {
            f"{role}_updates": tuple(
                update._replace(A=leaves[f"{role}[{number}].A"], B=leaves[f"{role}[{number}].B"])
                for number, update in enumerate(given)
            )
            for role, given in self._updates().items()
        }
        out = kernel(leaves["hidden_states"], self.top_k_index, leaves["top_k_weights"], self.weights, **updates)
        gradients = torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype), allow_unused=True)
        return out.detach(), dict(zip(leaves, gradients, strict=True))

    def double(self) -> Call:
        """The same numbers in float64."""
        return self._with(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)

    def to(self, device: str) -> Call:
        """The same on another device."""
        return self._with(lambda tensor: tensor.to(device))

    def _updates(self) -> dict[str, Updates]:
        return {"up": self.up, "down": self.down, **({"gate": self.gate} if self.gate else {})}

    def _with(self, change: Callable[[Tensor], Tensor]) -> Call:
        # What was one tensor stays one: the updates of an adapter share its seed.
        known: dict[int, Tensor] = {}

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                if id(value) not in known:
                    known[id(value)] = change(value)
                return known[id(value)]
            if isinstance(value, tuple):
                items = [changed(item) for item in value]
                return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
            return value

        return Call(**{name: changed(value) for name, value in vars(self).items()})
