"""What a checkpoint needs beside its weights to be trained and asked: a tokenizer, made without a download."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# Every byte is a token, beside those for padding, beginning and end: any text can be encoded, without training.
VOCAB_SIZE = 256 + 3
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE, eos_token: str = "<eos>") -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCAB_SIZE` tokens, with or without a chat template."""
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": eos_token}
    alphabet = (*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)
