"""The MoE block of Llama 4 that sends a token to its own experts only."""

from __future__ import annotations

from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe


class SparseLlama4TextMoe(Llama4TextMoe):  # type: ignore[misc]
    """Takes the place of `Llama4TextMoe` while its experts are adapted.

    The stock block repeats all tokens for every expert and scales those that the router did not choose by zero: E/K
    times the work and the memory. Here ``self.experts`` is called with tokens, chosen experts and routing weights.
    """

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """As the stock block: ``(..., H)`` to ``(T, H)`` and the router's logits ``(T, E)``."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        router_scores, router_logits = self.router(hidden_states)
        # Scores of the experts that were not chosen are zero, so the largest are those of the chosen.
        top_k_weights, top_k_index = router_scores.topk(self.top_k, dim=-1)
        routed = self.experts(hidden_states, top_k_index, top_k_weights)
        return self.shared_expert(hidden_states) + routed, router_logits
