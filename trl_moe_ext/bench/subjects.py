"""The models that are measured, and what a step of each is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from trl_moe_ext.experts.finding import FoundExperts, find_experts
from trl_moe_ext.router.top_k import experts_per_token


class Subject(ABC):
    """A model, how to draw the inputs of a step, and how to run it.

    Attributes:
        model: what adapters are attached to.
        found: its routed experts.
        top_k: experts a token; None where the config does not tell.
    """

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model = model
        self.found: FoundExperts = find_experts(dict(model.named_modules()))
        self.top_k = experts_per_token((), config.get_text_config())

    @abstractmethod
    def draw(self, tokens: int) -> tuple[Tensor, ...]:
        """Random inputs, new ones at each call, so that the routing is new as well."""

    @abstractmethod
    def step(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Forward and backward of `model`, which is `self.model` with an adapter; returns what the forward made."""


class LanguageModel(Subject):
    """A whole model that learns to predict its tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, model.config)

    def draw(self, tokens: int) -> tuple[Tensor, ...]:
        """``(1, tokens)`` token ids."""
        model: Any = self.model
        vocabulary = model.config.get_text_config().vocab_size
        return (torch.randint(0, vocabulary, (1, tokens), device=model.device),)

    def step(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Returns the loss."""
        (tokens,) = inputs
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        torch.autograd.backward(loss)
        return loss.detach()


class ExpertsAlone(Subject):
    """The routed experts of a model's only layer, with random routing.

    Where only the block around the experts can be called (Llama 4), it is the block, whose router chooses.

    Attributes:
        experts: the family's own module of experts.
        layout: of its weights.
        is_block: whether the model is the block.
    """

    def __init__(self, model: Any) -> None:
        ((name, layout),) = find_experts(dict(model.named_modules())).stacks.items()
        self.experts = model.get_submodule(name)
        self.layout = layout
        self.is_block = layout.sparse_block is not None
        part = model.get_submodule(name.rpartition(".")[0]) if self.is_block else self.experts
        super().__init__(Around(part), model.config)

    def draw(self, tokens: int) -> tuple[Tensor, ...]:
        """A gradient of the output, activations of unit scale, chosen experts and their weights; or the first two."""
        like = next(self.experts.parameters())
        hidden = torch.randn(tokens, self.layout.down.out_features, dtype=like.dtype, device=like.device)
        grad = torch.randn_like(hidden)
        if self.is_block:
            return grad, hidden.requires_grad_()
        assert self.top_k is not None, "teach router.top_k this config's word for the experts of a token"
        scores = torch.randn(tokens, self.layout.num_experts, device=like.device).softmax(dim=-1)
        weights, index = scores.topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(like.dtype)
        # In a model the router sees the same tokens, and their gradient passes through the weights as well.
        return grad, hidden.requires_grad_(), index, weights.requires_grad_()

    def step(self, model: nn.Module, *inputs: Tensor) -> Tensor:
        """Returns the output."""
        grad, *arguments = inputs
        result = model(*arguments)
        out: Tensor = result[0] if isinstance(result, tuple) else result  # a block returns the router's logits as well
        torch.autograd.backward(out, grad)
        return out.detach()


class Around(nn.Module):
    """A model that is nothing but one part of another: adapters need a parent of what they replace."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *inputs: Tensor) -> Any:
        """What the part returns."""
        return self.part(*inputs)
