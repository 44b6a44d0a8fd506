"""The tokens of a data set as `trl sft` would make them, in batches for a forward."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from trl.data_utils import (
    apply_chat_template,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
)

from trl_moe_ext.errors import ConfigError

__all__ = ["token_batches", "token_ids"]

IMAGES = ("image", "images")


def token_batches(
    rows: Iterable[dict[str, Any]], tokenizer: Any, *, text_column: str, batch_size: int, max_length: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of rows in their order, padded on the right.

    Args:
        rows: of a data set; they are taken as they are needed.
        tokenizer: of the model.
        text_column: of rows that are neither chats nor prompts with completions.
        batch_size: B.
        max_length: longest sequence, in tokens; of longer ones the start is taken.

    Returns:
        ``input_ids`` and ``attention_mask``, each ``(B, L)``.
    """
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    numbered = (_ids_of(number, row, tokenizer, text_column) for number, row in enumerate(rows, start=1))
    sequences = (ids[:max_length] for ids in numbered if ids)
    while batch := list(islice(sequences, batch_size)):
        length = max(map(len, batch))
        yield {
            "input_ids": torch.tensor([[*ids, *[pad] * (length - len(ids))] for ids in batch]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in batch]),
        }


def _ids_of(number: int, row: dict[str, Any], tokenizer: Any, text_column: str) -> list[int]:
    """The tokens of a row, which is named if it has none that the model could take."""
    try:
        ids = token_ids(row, tokenizer, text_column)
    except RowError as error:
        raise ConfigError(
            f"row {number} of the data set cannot be made into text: {error}; remove or mend it"
        ) from error
    largest = max(ids, default=0)
    if largest >= len(tokenizer):
        raise ConfigError(
            f"row {number} of the data set has the token {largest}, and the tokenizer of the model knows "
            f"{len(tokenizer)}: it was made with another tokenizer; give the data set as text"
        )
    return ids


class RowError(ValueError):
    """A row that is no text."""


def token_ids(row: dict[str, Any], tokenizer: Any, text_column: str) -> list[int]:
    """The tokens of one row, all of its text: a chat, a prompt with its completion, a text, or ``input_ids``.

    Raises:
        ConfigError: the row is none of that, or has images.
        RowError: what is in it is no text, or does not suit the tokenizer's template.
    """
    if "input_ids" in row:
        return list(row["input_ids"])
    if any(column in row for column in IMAGES):
        raise ConfigError("the data set has images; only texts can be profiled")
    try:
        if is_conversational_from_value(row):
            row = maybe_convert_to_chatml(row)
        if is_conversational(row):
            ids: list[int] = tokenizer(_rendered(row, tokenizer), add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(_plain(row, tokenizer.eos_token or "", text_column))["input_ids"]
    except (TemplateError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise RowError(told) from error
    return ids


def _rendered(row: Mapping[str, Any], tokenizer: Any) -> str:
    """A chat in the words of the tokenizer's template."""
    if "prompt" in row and "completion" not in row:
        raise ConfigError("the data set has prompts without completions; a profile is of whole texts")
    if not tokenizer.chat_template:
        raise ConfigError("the rows are chats, and the tokenizer of the model has no chat template")
    columns = ("prompt", "completion") if "prompt" in row else ("messages",)
    tools = row.get("tools")
    chat = {name: row[name] for name in (*columns, "chat_template_kwargs") if row.get(name) is not None}
    parts = apply_chat_template(chat, tokenizer, json.loads(tools) if isinstance(tools, str) else tools)
    return "".join(parts[name] for name in ("text", "prompt", "completion") if name in parts)


def _plain(row: Mapping[str, Any], end: str, text_column: str) -> str:
    """A text with its end, which chats have from their template."""
    if text_column in row:
        text = row[text_column]
    elif "prompt" in row and "completion" in row:
        text = row["prompt"] + row["completion"]
    else:
        raise ConfigError(
            f"the rows have the columns {', '.join(row)}: neither messages, nor prompt and completion, nor "
            f"{text_column}; name the column of the text with --text_column"
        )
    if not isinstance(text, str):
        raise ValueError(f"{text_column} is {text!r}")
    return text if text.endswith(end) else text + end
