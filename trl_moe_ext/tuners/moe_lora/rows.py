"""A single projection of all experts with grouped LoRA, for modules that are called with rows sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trl_moe_ext.experts.layout import Projection, weight_view
from trl_moe_ext.kernels.dispatch import rows_of_experts
from trl_moe_ext.kernels.lora_linear import lora_linear
from trl_moe_ext.tuners.moe_lora.config import MoeLoraConfig
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts


class MoeLoraRows(MoeLoraExperts):
    """Wraps one stack of Linears; called with ``(S, in)`` rows and the number of rows of each expert."""

    def _is_adapted(self, projection: Projection, config: MoeLoraConfig) -> bool:
        # Whether this is a first or a second projection is known from its place in the model: the targets chose it.
        return True

    def _run(self, adapters: list[str], rows: Tensor, rows_per_expert: Sequence[int]) -> Tensor:  # type: ignore[override]
        (projection,) = self.layout.projections
        return lora_linear(
            rows,
            weight_view(self.get_base_layer(), projection, self.layout),
            self._updates(adapters, projection, rows.device),
            rows_of_experts(rows_per_expert, rows.device),
        )
