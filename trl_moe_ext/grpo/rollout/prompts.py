"""Which prompt a group is of: a pure function of its id, so that a resumed run asks for the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trl_moe_ext.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "PromptSource"]

# Columns that are no keyword arguments of reward functions: those that are given in another form.
NO_ARGUMENTS = {"prompt", "completion"}
# What a reward function is given besides the columns.
TAKEN = {"prompts", "completions", "completion_ids"}
# Tokens that a tokenizer adds to a text: a beginning and an end of the sequence, and some room.
ADDED_TOKENS = 16


@dataclass(frozen=True)
class Prompt:
    """A row of the dataset.

    Attributes:
        prompt: as it stands in the dataset: a text or a list of messages.
        token_ids: what the generator is asked to continue, at least one token.
        columns: all other columns.
    """

    prompt: str | list[dict[str, Any]]
    token_ids: tuple[int, ...]
    columns: dict[str, Any]

    @property
    def conversational(self) -> bool:
        """Whether it is made of messages."""
        return not isinstance(self.prompt, str)


class PromptSource:
    """The prompts of a run: epoch after epoch, each in an order of its own.

    Args:
        dataset: with a column ``prompt``.
        tokenizer: with a chat template if prompts are lists of messages.
        seed: of the order.
        shuffle: False for the order of the dataset.
        max_prompt_length: tokens that leave room for a completion; None for any number.

    Attributes:
        longest: tokens of the longest prompt.

    Raises:
        ConfigError: there is no prompt, one is neither text nor messages, or one is too long; or a column has the name
            of something else that reward functions are given.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        shuffle: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        max_prompt_length: int | None = None,
    ) -> None:
        columns = list(dataset.column_names or [])
        if "prompt" not in columns:
            raise ConfigError(f"the dataset has no column 'prompt', only {columns}; rename one to 'prompt'")
        if taken := sorted(TAKEN.intersection(columns)):
            raise ConfigError(
                f"the dataset has columns {taken}, which reward functions would get in the place of the arguments of "
                "that name, made of prompt and completions; rename these columns"
            )
        if not len(dataset):
            raise ConfigError("the dataset is empty: there is nothing to generate from")
        self._dataset, self._tokenizer = dataset, tokenizer
        self._seed, self._shuffle = seed, shuffle
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._orders: dict[int, NDArray[np.int64]] = {}
        self.longest = self._checked_longest(max_prompt_length)

    def __len__(self) -> int:
        """Rows: prompts of an epoch."""
        return len(self._dataset)

    @property
    def order(self) -> dict[str, Any]:
        """What the order of the prompts depends on; JSON."""
        return {"rows": len(self), "seed": self._seed, "shuffle": self._shuffle}

    def check_order(self, found: Any) -> None:
        """Raise ConfigError if a checkpoint that holds `found` counts other prompts."""
        if found != self.order:
            raise ConfigError(
                f"the checkpoint counts prompts of {found}, but this run has {self.order}; resume with the dataset "
                "and the options that it was begun with"
            )

    def row(self, group_id: int) -> int:
        """The row of the dataset that a group is of."""
        epoch, position = divmod(group_id, len(self))
        if not self._shuffle:
            return position
        if epoch not in self._orders:
            # Groups that are given back may be of the epoch before.
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self))
        return int(self._orders[epoch][position])

    def __getitem__(self, group_id: int) -> Prompt:
        """The prompt of a group."""
        row = dict(self._dataset[self.row(group_id)])
        columns = {name: value for name, value in row.items() if name not in NO_ARGUMENTS}
        return Prompt(row["prompt"], self._encode(self._text(row["prompt"]), row["prompt"]), columns)

    def _text(self, prompt: str | list[dict[str, Any]]) -> str:
        """What is tokenised; the template has put the special tokens of a conversation into its text."""
        if isinstance(prompt, str):
            return prompt
        # An answer that has been begun is continued.
        begun = prompt[-1]["role"] == "assistant"
        text: str = self._tokenizer.apply_chat_template(
            prompt,
            tokenize=False,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            **self._template_kwargs,
        )
        return text

    def _encode(self, text: str, prompt: str | list[dict[str, Any]]) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"])

    def _checked_longest(self, limit: int | None) -> int:
        longest = 0
        for row, prompt in enumerate(self._dataset["prompt"]):
            text = self._checked_text(row, prompt)
            # A token is of one byte at least: many texts need not be tokenised to know that they are shorter.
            size = len(text.encode("utf-8", "surrogatepass"))
            if size and size + ADDED_TOKENS <= longest:
                continue
            length = len(self._encode(text, prompt))
            if not length:
                raise ConfigError(f"the prompt of row {row} has no token; leave the row out")
            if limit is not None and length > limit:
                raise ConfigError(
                    f"the prompt of row {row} has {length} tokens, of which {limit} leave room for a completion; "
                    "filter the dataset, or lower max_completion_length"
                )
            longest = max(longest, length)
        return longest

    def _checked_text(self, row: int, prompt: Any) -> str:
        messages = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
        if not isinstance(prompt, str) and not messages:
            raise ConfigError(
                f"the prompt of row {row} should be a text or a list of messages with 'role' and 'content', but is "
                f"{prompt!r:.200}"
            )
        try:
            return self._text(prompt)
        except Exception as error:
            raise ConfigError(f"the chat template refuses the prompt of row {row}: {error}") from error
