"""Models that see images: their language model's routers are traced, over the tokens of images as well."""

from __future__ import annotations

import pytest
import torch

from tests.families import build
from tests.sft.runs import gradients, joined, logged, rows, sft, train
from tests.tolerances import RELATIVE_ERROR
from trl_moe_ext import MoeLoraConfig

IMAGE_TOKENS = 4  # of an image of 32 by 32 pixels in the tiny model


def with_images(image_token: int):
    """A collator that puts an image before the text of every sequence but the first."""

    def collate(examples):
        images = [[], *([image_token] * IMAGE_TOKENS for _ in examples[1:])]
        batch = joined([image + example["input_ids"] for image, example in zip(images, examples, strict=True)])
        batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == image_token, -100)
        generator = torch.Generator().manual_seed(len(examples))
        batch["pixel_values"] = torch.randn(len(examples) - 1, 3, 32, 32, generator=generator)
        return batch

    return collate


def run(folder, coefficient):
    # Four neighbouring patches make one token, whose width the tiny config does not know.
    model = build("llama4", vision_config={"intermediate_size": 256})
    trainer = sft(
        folder,
        model,
        peft_config=MoeLoraConfig(r=4),
        router_aux_loss_coef=coefficient,
        router_metrics="full",
        per_device_train_batch_size=4,
        others={"data_collator": with_images(model.config.image_token_index)},
    )
    return trainer, *train(trainer)


def test_a_router_loss_is_added(tmp_path):
    trainer, losses, before = run(tmp_path, 0.0)
    _, total, after = run(tmp_path, 0.5)
    values = logged(trainer, "router/aux_loss")
    assert len(losses) == len(total) == len(values) == 2
    for loss, sum_, value in zip(losses, total, values, strict=True):
        assert sum_ - loss == pytest.approx(0.5 * value, rel=RELATIVE_ERROR[torch.float32][0])
    assert any(not torch.equal(after[0][name], before[0][name]) for name in before[0])
    assert logged(trainer, "router/topk_overlap/0")


def test_tokens_of_images_count_and_padding_does_not(tmp_path):
    trainer, *_ = run(tmp_path, 0.0)
    batch = with_images(trainer.model.config.image_token_index)([{"input_ids": ids} for ids in rows(4)])
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    assert gradients(trainer.model)
    (tokens,) = {float(layer.tokens) for layer in trainer._session._meters["train"]._layers.values()}
    assert tokens == sum(map(len, rows(4))) + 3 * IMAGE_TOKENS
