"""LoRA on a router that is a Linear."""

from __future__ import annotations

from peft.tuners.lora.layer import Linear
from torch import Tensor


class MoeLoraRouter(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer, whose `weight` has the active adapters in it.

    Some blocks read their router's weight instead of calling it, to multiply in float32. With PEFT's own layer they
    would read the frozen weight, and the adapter would never be trained.
    """

    @property
    def weight(self) -> Tensor:
        """``(E, H)`` with the updates of the active adapters, through which gradients flow; without dropout."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        weight: Tensor = self.get_base_layer().weight
        if self.disable_adapters or self.merged:
            return weight
        for name in self.active_adapters:
            if name in self.lora_A:
                update = self.scaling[name] * (self.lora_B[name].weight @ self.lora_A[name].weight)
                weight = weight + update.to(weight.dtype)
        return weight
