"""Write the quickstart's dataset, then train its tokenizer and its small Qwen3-MoE model from scratch.

    python configs/quickstart/make_model.py

It takes some ten minutes on one CPU core, needs no network, and depends on torch, transformers and tokenizers alone.
The same machine, versions, seed and number of threads give the same files. ``--data-only`` writes no model.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from harbour.chat_tokenizer import MAX_LENGTH, train_tokenizer
from harbour.corpus import SEED, Chat, pretraining_chats
from harbour.keeper import write_dataset
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

HERE = Path(__file__).resolve().parent

ROW_LENGTH = 160
BATCH_ROWS = 16
LEARNING_RATE, FINAL_LEARNING_RATE = 3e-3, 1e-4
WARMUP_STEPS = 60
BALANCE_COEFFICIENT = 0.002  # with Qwen3MoeConfig's default of 0.001 one expert kept 1 % of the tokens of some topics
TOKENIZER_CHATS = 6000
LOG_EVERY = 50


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Return the model with random weights: 4 layers of 8 experts, 2 of them for each token."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3MoeForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """One training batch; each tensor is ``(BATCH_ROWS, ROW_LENGTH)``.

    Attributes:
        ids: token ids, padded on the right.
        real: False on the padding.
        learnt: True on the tokens of the assistant's replies, those that the loss counts.
    """

    ids: torch.Tensor
    real: torch.Tensor
    learnt: torch.Tensor


Row = list[tuple[int, int]]
"""Pairs of a token id and 1 where the token is the assistant's."""


def packed_rows(chats: Iterator[Chat], tokenizer: PreTrainedTokenizerFast) -> Iterator[Row]:
    """Yield rows of whole chats, each of at most ``ROW_LENGTH`` tokens."""
    row: Row = []
    for chat in chats:
        encoded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        pairs = list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))
        if len(row) + len(pairs) > ROW_LENGTH:
            yield row
            row = []
        row += pairs[:ROW_LENGTH]


def batches(rows: Iterator[Row]) -> Iterator[Batch]:
    """Yield padded batches of ``rows``."""
    while group := list(islice(rows, BATCH_ROWS)):
        real = torch.arange(ROW_LENGTH) < torch.tensor([len(row) for row in group])[:, None]
        padded = torch.tensor([row + [(0, 0)] * (ROW_LENGTH - len(row)) for row in group])
        yield Batch(ids=padded[..., 0], real=real, learnt=padded[..., 1].bool())


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a half cosine down to ``FINAL_LEARNING_RATE``."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return FINAL_LEARNING_RATE + (LEARNING_RATE - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def balance_loss(router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor, config: Qwen3MoeConfig) -> torch.Tensor:
    """Return the mean over layers of the load-balancing loss.

    transformers pools the layers into one term, in which one layer's collapse can hide behind the others.
    """
    experts, top_k = config.num_experts, config.num_experts_per_tok
    losses = [load_balancing_loss_func((logits,), experts, top_k, mask) for logits in router_logits]
    return torch.stack(losses).mean()


def pretrain(model: Qwen3MoeForCausalLM, batches: Iterator[Batch], steps: int) -> None:
    """Train ``model`` in place on ``steps`` batches, on the assistant's tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(islice(batches, steps)):
        outputs = model(input_ids=batch.ids, output_router_logits=True)
        labels = batch.ids.masked_fill(~batch.learnt, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten())
        balance = balance_loss(outputs.router_logits, batch.real, model.config)
        (loss + BALANCE_COEFFICIENT * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step:5d}  loss {loss:.3f}  balance {balance:.3f}  {seconds:.0f} s", flush=True)


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the model and its tokenizer; the weights are rounded to bfloat16 on disk.

    The config still asks for float32, so that they load and compute in float32 unless the user says otherwise.
    """
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder that receives data/ and model/")
    parser.add_argument("--steps", type=int, default=1600, help="training steps")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--data-only", action="store_true", help="write the dataset and stop")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    write_dataset(arguments.output / "data")
    if arguments.data_only:
        return
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    sample = islice(pretraining_chats(random.Random(arguments.seed)), TOKENIZER_CHATS)
    tokenizer = train_tokenizer(message["content"] for chat in sample for message in chat)
    model = make_model(tokenizer)
    rows = packed_rows(pretraining_chats(random.Random(arguments.seed)), tokenizer)
    pretrain(model, batches(rows), arguments.steps)
    save(model, tokenizer, arguments.output / "model")


if __name__ == "__main__":
    main()
