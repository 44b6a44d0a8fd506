"""TRL's fused output layer, on models that do not say what it asks of them.

TRL's trainers compute the log-probabilities of the labels from the last hidden states and the weight of the output
layer. They ask the model for its body (`base_model`) and its config for the number of experts. Some families have no
body apart from the model, or call the number by another name, and the first step ends in an AttributeError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from trl_moe_ext.errors import HostVersionError

__all__ = ["complete_fused_head"]


def complete_fused_head(model: Any, stock_forward: Callable[..., Any]) -> None:
    """Have the fused forward of `model` find what it asks for; nothing happens where it finds all of it.

    Args:
        model: to which TRL has just added a fused output layer.
        stock_forward: the forward that it had before.
    """
    text_config = model.config.get_text_config()
    if not hasattr(text_config, "num_experts") and hasattr(text_config, "num_local_experts"):
        text_config.num_experts = text_config.num_local_experts
    if model.base_model is model:
        # The function of TRL, with the view in the place of the model.
        model.forward = MethodType(model.forward.__func__, _WithBody(model, stock_forward))


class _WithBody:
    """A model without a body apart from it, as the fused forward wants to see it; all else is the model's own.

    Args:
        model: the model.
        forward: the model's own forward.
    """

    def __init__(self, model: Any, forward: Callable[..., Any]) -> None:
        self._model = model
        self._forward = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def base_model(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        """Last hidden states ``(batch, length, H)`` and router logits, for the arguments of the model's forward."""
        head = self._model.get_output_embeddings()
        with _passing_through(head):
            outputs = self._forward(*args, **kwargs)
        hidden = outputs.logits
        if hidden.shape[-1] != head.weight.shape[-1]:
            raise HostVersionError(
                f"{type(self._model).__name__} does not return what its output layer returns: {hidden.shape[-1]} "
                f"values a token instead of {head.weight.shape[-1]}. TRL's trainers cannot train it with this "
                "version of transformers"
            )
        return MoeModelOutputWithPast(last_hidden_state=hidden, router_logits=getattr(outputs, "router_logits", None))


@contextmanager
def _passing_through(module: nn.Module) -> Iterator[None]:
    """`module` returns its input meanwhile."""
    before = vars(module).get("forward")
    module.forward = _input
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _input(hidden: Any) -> Any:
    return hidden
