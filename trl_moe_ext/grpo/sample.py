"""What a scored completion carries from the generator to the loss.

TRL hands a sample through its packing as a dictionary of a few fields; `SampleMetrics`, one of them, carries the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from trl_moe_ext.grpo.backends.generation import Segment
from trl_moe_ext.grpo.trl_async import RolloutSample
from trl_moe_ext.router.record import RoutingRecord

__all__ = ["MoeRolloutSample", "SampleMetrics"]


@dataclass(slots=True, kw_only=True)
class MoeRolloutSample(RolloutSample):  # type: ignore[misc]
    """TRL's sample: `input_ids`, `completion_mask` and `old_log_probs` are ``(P + C,)``, of prompt and completion.

    Attributes:
        segments: which version of the adapter drew which tokens of the completion.
        routes: of the P + C tokens, if the backend recorded them.
    """

    segments: tuple[Segment, ...]
    routes: RoutingRecord | None = None


class SampleMetrics(dict[str, float]):
    """The metrics of a sample, and the sample itself: TRL passes the dictionary on to the collator as it is."""

    sample: MoeRolloutSample
