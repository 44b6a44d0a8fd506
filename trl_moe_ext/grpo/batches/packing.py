"""Rows of packed samples: what TRL's packing makes of them, with the routes of each packed token.

Legend: B rows of a micro-batch, one for each process; T packed tokens of a row, M tokens that are trained on, R
routers, K the largest top_k of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trl_moe_ext.errors import ConfigError, HostVersionError
from trl_moe_ext.grpo.batches.routes import RouteSlots, merge_routes
from trl_moe_ext.grpo.sample import MoeRolloutSample
from trl_moe_ext.grpo.trl_async import DataCollatorForRollout, TreeRow
from trl_moe_ext.router.record import NOT_RECORDED, RoutingRecord

__all__ = ["PackedRow", "RolloutCollator", "made_up_batch", "packed_order", "routes_of", "sample_of", "samples_of"]

_TREE = ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")


@dataclass(frozen=True)
class PackedRow:
    """The row of one process, without the padding that makes rows of one micro-batch equally long.

    Attributes:
        arguments: of the model's forward, whose log-probabilities are ``(1, T)``.
        token_index: ``(M,)``, the packed position that predicts each trained token.
        old_log_probs: ``(M,)``, by the generator.
        advantages: ``(M,)``.
        sequence: ``(M,)``, which sample of the row a token is of.
    """

    arguments: dict[str, Any]
    token_index: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    sequence: Tensor

    @classmethod
    def of(cls, inputs: dict[str, Tensor]) -> PackedRow:
        """From the part of a batch, ``(1, ...)``, that one process has."""
        kept, trained = inputs["attention_mask"].bool(), inputs["token_index"] >= 0
        arguments: dict[str, Any] = {
            name: inputs[name][kept].unsqueeze(0) for name in ("input_ids", "position_ids", "shift_labels")
        }
        arguments |= {name: inputs[name][inputs[name] >= 0] for name in _TREE}
        longest_segment, longest_path = inputs["tree_max_seqlens"][0].tolist()
        arguments |= {"tree_max_seqlen_q": longest_segment, "tree_max_seqlen_k": longest_path}
        names = ("token_index", "old_log_probs", "advantages", "segment_id")
        return cls(arguments, *(inputs[name][trained] for name in names))


@dataclass
class RolloutCollator(DataCollatorForRollout):  # type: ignore[misc]
    """TRL's collator, which adds ``routes`` if some of the samples have any: ``(B, T, R, K)`` int16, -1 for none.

    Attributes:
        slots: of the model that is trained; None if it has no router.
        needs_routes: whether a sample without routes is an error.
    """

    slots: RouteSlots | None = None
    needs_routes: bool = False

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        """A micro-batch, of the rows that the one example is.

        Raises:
            ConfigError: routes are missing, or of another model or sequence.
        """
        batch: dict[str, Any] = super().torch_call(examples)
        (rows,) = examples
        has_routes = any(sample.routes is not None for sample in samples_of(rows))
        if self.slots is not None and (has_routes or self.needs_routes):
            lengths = batch["attention_mask"].sum(1).tolist()
            found = [
                self._routes(row, tokens[:length], self.slots)
                for row, tokens, length in zip(rows, batch["input_ids"], lengths)
            ]
            batch["routes"] = pad_sequence(found, batch_first=True, padding_value=NOT_RECORDED)
        return batch

    def _routes(self, row: TreeRow, input_ids: Tensor, slots: RouteSlots) -> Tensor:
        """``(T, R, K)`` of the packed tokens of a row."""
        order = packed_order(row)
        if [row.tokens[node] for node in order] != input_ids.tolist():
            raise HostVersionError(
                "TRL packs the tokens of its prefix tree in another order than trl_moe_ext knows, so routes can't be "
                "told apart; install trl 1.16, or switch routing_replay off"
            )
        samples = [(nodes, self._encoded(sample_of(e), slots)) for e, nodes in zip(row.samples, row.sample_nodes)]
        merged, conflicts = merge_routes(slots, len(order), samples)
        self.metrics["router/replay_conflict_frac"].append((float(conflicts.sum()), float(len(order))))
        return merged[torch.tensor(order)]

    def _encoded(self, sample: MoeRolloutSample, slots: RouteSlots) -> Tensor:
        num_tokens = len(sample.input_ids)
        if sample.routes is None:
            if self.needs_routes:
                raise ConfigError(
                    f"routing_replay needs the routes of all tokens, but the backend gave a sample of prompt "
                    f"{sample.group_id} without any. Switch routing_replay off, or use a backend that records them"
                )
            return slots.blank(num_tokens)
        if len(sample.routes) != num_tokens:
            raise ConfigError(
                f"a sample of prompt {sample.group_id} has {num_tokens} tokens, but the backend gave routes of "
                f"{len(sample.routes)}; they should be of all tokens of prompt and completion"
            )
        return slots.encode(sample.routes)


def packed_order(row: TreeRow) -> list[int]:
    """The nodes of the prefix tree in the order in which `TreeRow.pack` lays them out: parents first, as added."""
    order: list[int] = []
    waiting = [*reversed(row.roots.values())]
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting.extend(reversed(row.children[node].values()))
    return order


def routes_of(inputs: dict[str, Tensor], slots: RouteSlots) -> RoutingRecord | None:
    """The record of the row of one process, of all its packed tokens without padding; None if there is none."""
    if "routes" not in inputs:
        return None
    kept = inputs["attention_mask"].bool()
    return slots.decode(inputs["routes"][kept].cpu())


def made_up_batch(num_tokens: int, pad_token_id: int) -> dict[str, Any]:
    """A micro-batch of one sample of the first so many tokens of the vocabulary, as TRL's collator makes it."""
    row, tokens = TreeRow(), np.arange(num_tokens)
    sample = {"input_ids": tokens, "completion_mask": tokens > 0, "old_log_probs": np.zeros(num_tokens)}
    row.add(sample | {"advantage": 0.0, "group_id": 0, "metrics": {}})
    batch: dict[str, Any] = DataCollatorForRollout(pad_token_id)([[row]])
    return batch


def samples_of(rows: Sequence[TreeRow]) -> list[MoeRolloutSample]:
    """The samples of some rows, which TRL's packing carries as dictionaries of a few fields."""
    return [sample_of(entry) for row in rows for entry in row.samples]


def sample_of(entry: dict[str, Any]) -> MoeRolloutSample:
    """The sample that one such dictionary is of."""
    sample: MoeRolloutSample = entry["metrics"].sample
    return sample
