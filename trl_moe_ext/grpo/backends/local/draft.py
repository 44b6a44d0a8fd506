"""A completion under way: which version of the adapter draws its tokens, and where the routers have sent them."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl_moe_ext.grpo.backends.generation import Segment
from trl_moe_ext.router.record import RoutingRecord

__all__ = ["Draft"]


@dataclass
class Draft:
    """One completion under way.

    Attributes:
        prompt_length: tokens of its prompt.
        version: of the adapter when it was asked for.
    """

    prompt_length: int
    version: int
    _starts: list[tuple[int, int]] = field(init=False)
    _routes: list[RoutingRecord] = field(default_factory=list, init=False)
    _recorded: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._starts = [(self.version, 0)]

    def switch(self, version: int, drawn: int) -> None:
        """All tokens after the first `drawn` ones are drawn by another version."""
        if self._starts[-1][1] == drawn:
            self._starts.pop()
        self._starts.append((version, drawn))

    def segments(self, num_tokens: int) -> tuple[Segment, ...]:
        """Which version drew which of the `num_tokens` tokens of the finished completion."""
        ends = [start for _, start in self._starts[1:]] + [num_tokens]
        counts = [(version, end - start) for (version, start), end in zip(self._starts, ends)]
        return tuple(Segment(version, count) for version, count in counts if count)

    def record(self, position: int, routes: RoutingRecord, drawn: int) -> None:
        """Keep where a forward has sent some tokens.

        A request that had to make room in the cache is run again from its first token. Tokens that were drawn before
        stay recorded as they were: their log-probabilities come from there.

        Args:
            position: of the first of the tokens, in prompt and completion.
            routes: of the tokens.
            drawn: tokens of the completion that were drawn before this forward.
        """
        again = self._recorded - position
        assert again >= 0, f"{-again} tokens before position {position} were never seen"
        if again and not drawn:
            self._routes = [RoutingRecord.cat(self._routes).rows(slice(position))]
            self._recorded = position
        elif again:
            routes = routes.rows(slice(again, None))
        self._routes.append(routes)
        self._recorded += len(routes)

    def routes(self, num_tokens: int, blank: RoutingRecord) -> RoutingRecord:
        """The routes of prompt and completion.

        Args:
            num_tokens: of the finished completion.
            blank: of one token; for the last one, which the model was not run on.
        """
        expected = self.prompt_length + num_tokens - 1
        assert self._recorded == expected, f"the routers were seen at {self._recorded} tokens of {expected}"
        return RoutingRecord.cat([*self._routes, blank])
