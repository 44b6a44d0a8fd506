"""One forward of a tiny model of each family, and what is known of its routing from other sides than the trace.

The yardsticks share nothing with the code under test: what the experts are called with is taken from hooks on the
experts, what the family records from transformers' own ``output_router_logits``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.families import COMPOSITES, FAMILIES, build, inputs
from trl_moe_ext.experts.finding import find_experts
from trl_moe_ext.router.routers import Router, find_routers, routers_left_out
from trl_moe_ext.router.trace import RouterTrace, Routing

# transformers gives it no forward: its parts, such as qwen3_omni_moe_thinker, are types of their own.
WITHOUT_FORWARD = {"qwen3_omni_moe"}
TYPES = [model_type for model_type in (*FAMILIES, *COMPOSITES) if model_type not in WITHOUT_FORWARD]
# Routers that a forward with tokens alone does not reach: they are for images.
NOT_REACHED = {"dots3_note": "vision_tower.", "ernie4_5_vl_moe": "vision_moe", "ernie4_5_vl_moe_text": "vision_moe"}
# The forms in which families hand out a routing, one type each.
FORMS = {
    "qwen3_moe": "chosen experts and weights",
    "deepseek_v4": "the same, behind a layer that a hash routes",
    "zaya": "the same, with a class for no expert",
    "longcat_flash": "the same, with identity experts",
    "gemma4_text": "the same, beside probabilities",
    "llama4_text": "weights of all experts, zero for those that were not chosen",
    "nllb-moe": "the same, and experts with a capacity",
    "switch_transformers": "a mask",
    "jetmoe": "rows sorted by expert, in attention too",
    "doge": "sums of two keys",
    "dbrx": "logits alone",
}

Calls = dict[str, list[tuple[list[Any], dict[str, Any]]]]


@dataclass
class Observed:
    """What was seen.

    Attributes:
        routers, left_out: what was found.
        routings: what the trace told, in order.
        calls: modules of experts and routers -> the arguments that they were called with, in order.
        recorded: router logits in the model's own output, in order; None if it has none.
        blocks: modules around experts.
    """

    routers: list[Router]
    left_out: dict[str, str]
    routings: list[Routing] = field(default_factory=list)
    calls: Calls = field(default_factory=dict)
    recorded: list[Tensor] | None = None
    blocks: set[str] = field(default_factory=set)

    def call(self, name: str) -> list[Any]:
        """All arguments of the only call of a module."""
        ((args, kwargs),) = self.calls[name]
        return [*args, *kwargs.values()]


@functools.cache
def observed(model_type: str) -> Observed:
    """One forward of a tiny model in evaluation mode, without gradients."""
    return observe(build(model_type), model_type)


def observe(model: nn.Module, model_type: str) -> Observed:
    seen = Observed(find_routers(model), routers_left_out(model))
    modules = dict(model.named_modules())
    experts = find_experts(modules).modules
    # Doge's experts are embeddings of the block, which is therefore also the module that holds them.
    seen.blocks = {name if model_type == "doge" else name.rpartition(".")[0] for name in experts}
    watched = {*experts, *(router.name for router in seen.routers)}
    watched |= {name for name in modules if name.endswith("down_embed")}
    handles = [_record_calls(modules[name], seen.calls.setdefault(name, [])) for name in watched]
    torch.manual_seed(0)
    with torch.no_grad(), RouterTrace(seen.routers, seen.routings.append):
        output = model(**inputs(model_type), output_router_logits=True)
    for handle in handles:
        handle.remove()
    # In reverse: the encoder's before the decoder's, as they run.
    names = [name for name in sorted(output, reverse=True) if name.endswith("router_logits")]
    names = [name for name in names if output[name] is not None]
    seen.recorded = [logits for name in names for logits in output[name]] if names else None
    return seen


def _record_calls(module: nn.Module, calls: list[Any]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((list(args), dict(kwargs)))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def run(model_type: str, routers: list[Router]) -> list[Routing]:
    """The routings of a new model as its trace tells them for `routers`, which may be wrong on purpose."""
    seen: list[Routing] = []
    model = build(model_type)
    routers = [replace(router, module=model.get_submodule(router.name)) for router in routers]
    with torch.no_grad(), RouterTrace(routers, seen.append):
        model(**inputs(model_type))
    return seen


def weights_of_all(index: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """``(T, E)``: the weight of every expert, zero for those that were not chosen."""
    return torch.zeros(len(index), num_experts, dtype=weights.dtype).scatter_add(1, index, weights)


def called_weights(seen: Observed, routing: Routing, model_type: str) -> Tensor:
    """``(T, E)``: the weight of every expert by the arguments that the experts were called with."""
    read = _READERS.get(model_type.removesuffix("_text"), _read_pair)
    return read(seen, routing.router)


def _read_pair(seen: Observed, router: Router) -> Tensor:
    _, index, weights = seen.call(router.experts)
    return weights_of_all(index, weights, router.num_experts)


def _read_llama4(seen: Observed, router: Router) -> Tensor:
    """Every expert is called with all tokens, times their weights."""
    (tokens,) = seen.call(router.name)
    (scaled,) = seen.call(router.experts)
    largest = tokens.abs().argmax(1, keepdim=True)
    scaled = scaled.view(router.num_experts, *tokens.shape)
    return torch.stack([(of.gather(1, largest) / tokens.gather(1, largest)).squeeze(1) for of in scaled], 1)


def _read_switch(seen: Observed, router: Router) -> Tensor:
    _, mask, weights = seen.call(router.experts)
    return mask.squeeze(1) * weights


def _read_nllb(seen: Observed, router: Router) -> Tensor:
    _, _, weights = seen.call(router.experts)
    return weights


def _read_jetmoe(seen: Observed, router: Router) -> Tensor:
    """The rows of an expert are the tokens that chose it. Weights are applied outside: here each is one."""
    (tokens,) = seen.call(router.name)
    rows, sizes = seen.call(router.experts)
    chosen = torch.zeros(len(tokens), router.num_experts)
    for expert, of in enumerate(rows.split(sizes)):
        chosen[:, expert] = (of.unsqueeze(0) == tokens.unsqueeze(1)).all(-1).any(1)
    return chosen


def _read_doge(seen: Observed, router: Router) -> Tensor:
    (index,) = seen.call(f"{router.name}.down_embed")
    return weights_of_all(index, torch.ones(index.shape), router.num_experts)


_READERS: dict[str, Callable[[Observed, Router], Tensor]] = {
    "llama4": _read_llama4,
    "switch_transformers": _read_switch,
    "nllb-moe": _read_nllb,
    "jetmoe": _read_jetmoe,
    "doge": _read_doge,
}
