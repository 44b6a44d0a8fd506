"""What a rollout backend is asked for and what it gives: completions of token ids, and how they are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from trl_moe_ext.router.record import RoutingRecord

__all__ = ["Generation", "GenerationRequest", "Sampling", "Segment"]


@dataclass(frozen=True)
class Sampling:
    """How every completion of a run is drawn; names and meanings are those of TRL's config.

    Attributes:
        top_k: 0 for all tokens.
        eos_token_ids: each of them ends a completion, and is its last token.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """One completion that is asked for.

    Attributes:
        id: unique in the run; asked for again, after a restart, under the same id.
        prompt_ids: at least one token.
        seed: of this completion, for backends that can use it.
    """

    id: str
    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Segment:
    """Tokens in a row that one version of the adapter drew."""

    model_version: int
    num_tokens: int


@dataclass(frozen=True)
class Generation:
    """One finished completion.

    Attributes:
        token_ids: ``C`` tokens that were drawn, at least one, with the end-of-sequence token if it was drawn.
        log_probs: ``C`` natural logarithms of the probabilities that the tokens had when they were drawn, after
            temperature and whatever else shapes the distribution.
        segments: which version drew which of them, in order; their `num_tokens` add up to ``C``.
        routes: of all tokens of prompt and completion, if the backend was asked to record them; the last token, which
            the model was never run on, is not recorded.
    """

    id: str
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    segments: tuple[Segment, ...]
    routes: RoutingRecord | None = None

    @property
    def model_version(self) -> int:
        """The oldest version that drew one of the tokens."""
        return min(segment.model_version for segment in self.segments)
