"""Measure the quickstart's model on questions that its pretraining never saw.

    python configs/quickstart/measure.py

prints the loss on held-out chats, the share of exact answers, and how each layer's router spreads the tokens over its
experts.
"""

from pathlib import Path

import torch
from harbour.corpus import Chat, held_out_chats
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen3MoeForCausalLM

BATCH = 16


def padded_batches(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, torch.Tensor]]:
    """Return padded batches of ``input_ids``, ``attention_mask`` and ``assistant_masks``, each ``(batch, length)``."""
    return [
        tokenizer.apply_chat_template(
            chats[i : i + BATCH],
            return_dict=True,
            return_assistant_tokens_mask=True,
            padding=True,
            return_tensors="pt",
        )
        for i in range(0, len(chats), BATCH)
    ]


@torch.no_grad()
def assistant_loss(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> float:
    """Return the mean cross-entropy (nats a token) of the assistant's tokens in ``chats``."""
    total, count = 0.0, 0
    for batch in padded_batches(chats, tokenizer):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        mine = batch["assistant_masks"][:, 1:].bool()
        labels = batch["input_ids"][:, 1:][mine]
        total += torch.nn.functional.cross_entropy(logits[mine].float(), labels, reduction="sum").item()
        count += labels.numel()
    return total / count


@torch.no_grad()
def expert_shares(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> torch.Tensor:
    """Return each expert's share of the routed tokens, shape ``(layers, experts)``; each row sums to 1."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for batch in padded_batches(chats, tokenizer):
        real = batch["attention_mask"].flatten().bool()
        outputs = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
        )
        for layer, logits in enumerate(outputs.router_logits):
            chosen = logits[real].topk(config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen.flatten(), minlength=config.num_experts)
    return counts / counts.sum(dim=1, keepdim=True)


@torch.no_grad()
def exact_answers(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, chats: list[Chat]) -> float:
    """Return the share of ``chats`` whose last reply the model gives word for word, decoding greedily."""
    right = 0
    for chat in chats:
        prompt = tokenizer.apply_chat_template(
            chat[:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(output, skip_special_tokens=True) == chat[-1]["content"]
    return right / len(chats)


def main() -> None:
    folder = Path(__file__).resolve().parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chats = held_out_chats()
    print(f"{len(chats)} held-out questions")
    print(f"loss on their answers: {assistant_loss(model, tokenizer, chats):.3f} nats a token")
    print(f"exact answers: {exact_answers(model, tokenizer, chats):.0%}")
    print("share of the routed tokens by expert, in percent:")
    for layer, shares in enumerate(expert_shares(model, tokenizer, chats)):
        print(f"  layer {layer}: " + " ".join(f"{100 * share:5.1f}" for share in shares))


if __name__ == "__main__":
    main()
