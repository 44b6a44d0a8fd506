"""A group in flight: the completions of one prompt, from the requests for them to the samples that are trained on."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from trl_moe_ext.errors import MoeExtError
from trl_moe_ext.grpo.backends.generation import Generation, GenerationRequest
from trl_moe_ext.grpo.rewards.advantages import GroupScores
from trl_moe_ext.grpo.rollout.ledger import Ticket
from trl_moe_ext.grpo.rollout.prompts import Prompt
from trl_moe_ext.grpo.sample import MoeRolloutSample, SampleMetrics

__all__ = ["Group", "group_of_request"]


def group_of_request(request_id: str) -> int:
    """The group that a request is for."""
    return int(request_id.partition("/")[0])


class Group:
    """`num_generations` completions of one prompt, asked for under the ids ``group/attempt/index``."""

    def __init__(self, ticket: Ticket, prompt: Prompt, num_generations: int, seed: int) -> None:
        self.ticket, self.prompt = ticket, prompt
        prefix = f"{ticket.group_id}/{ticket.attempt}"
        self.requests = [
            GenerationRequest(f"{prefix}/{i}", prompt.token_ids, _seed(seed, f"{prefix}/{i}"))
            for i in range(num_generations)
        ]
        self._generations: dict[str, Generation] = {}

    def add(self, generation: Generation) -> None:
        """Take one of the completions.

        Raises:
            MoeExtError: the backend has broken its promises.
        """
        count = len(generation.token_ids)
        drawn = sum(segment.num_tokens for segment in generation.segments)
        if not count or len(generation.log_probs) != count or drawn != count:
            raise MoeExtError(
                f"completion {generation.id} has {count} tokens, {len(generation.log_probs)} log-probabilities and "
                f"segments of {drawn} tokens; the rollout backend should give one token at least, and as many of each"
            )
        self._generations[generation.id] = generation

    @property
    def complete(self) -> bool:
        """Whether all completions are there."""
        return len(self._generations) == len(self.requests)

    @property
    def generations(self) -> list[Generation]:
        """The completions of a complete group, in the order of the requests."""
        return [self._generations[request.id] for request in self.requests]

    def completions(self, texts: Sequence[str]) -> list[Any]:
        """The texts in the form of the prompt: a text each, or a list of one message."""
        if not self.prompt.conversational:
            return list(texts)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def reward_arguments(self, completions: Sequence[Any]) -> dict[str, list[Any]]:
        """Keyword arguments of a reward function, each a list with an item for every completion."""
        n = len(self.requests)
        return {
            "prompts": [self.prompt.prompt] * n,
            "completions": list(completions),
            "completion_ids": [list(generation.token_ids) for generation in self.generations],
            **{name: [value] * n for name, value in self.prompt.columns.items()},
        }

    def samples(
        self, completions: Sequence[Any], scores: GroupScores, function_names: Sequence[str]
    ) -> list[MoeRolloutSample]:
        """What is trained on, one of each completion."""
        return [
            self._sample(index, generation, completions[index], scores, function_names)
            for index, generation in enumerate(self.generations)
        ]

    def _sample(
        self, index: int, generation: Generation, completion: Any, scores: GroupScores, function_names: Sequence[str]
    ) -> MoeRolloutSample:
        context = len(self.prompt.token_ids)
        count = len(generation.token_ids)
        metrics = SampleMetrics(
            {
                "reward": float(scores.rewards[index]),
                "reward_std": scores.std,
                **{
                    f"rewards/{name}": float(rewards[index])
                    for name, rewards in zip(function_names, scores.by_function, strict=True)
                },
            }
        )
        metrics.sample = MoeRolloutSample(
            prompt=self.prompt.prompt,
            completion=completion,
            input_ids=np.asarray(self.prompt.token_ids + generation.token_ids, dtype=np.int64),
            completion_mask=np.repeat(np.asarray([0, 1], dtype=np.int64), [context, count]),
            old_log_probs=np.asarray((0.0,) * context + generation.log_probs, dtype=np.float32),
            advantage=float(scores.advantages[index]),
            model_version=generation.model_version,
            group_id=self.ticket.group_id,
            metrics=metrics,
            enqueued_at=time.time(),  # TRL subtracts it from the time of day
            segments=generation.segments,
            routes=generation.routes,
        )
        return metrics.sample


def _seed(run_seed: int, request_id: str) -> int:
    """63 bits that differ between requests, the same in every run of this seed."""
    digest = hashlib.blake2b(f"{run_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
