"""What is written into a router's output is read there again; all else stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import build
from tests.router.replayed import other_routes, run
from tests.router.routed import FORMS
from trl_moe_ext.router.reading import read_call, read_output
from trl_moe_ext.router.rewrite import write_call, write_output
from trl_moe_ext.router.routers import Router, find_routers

# DBRX's output holds no choice. A mask says which experts had room, and of keys only the sums are chosen from.
NOT_WRITTEN = {"dbrx", "doge", "nllb-moe", "switch_transformers"}


def outputs(model_type: str) -> list[tuple[Router, Any]]:
    """Routers of a tiny model and what they returned in one forward."""
    model = build(model_type)
    found: list[tuple[Router, Any]] = []
    for router in find_routers(model):
        router.module.register_forward_hook(lambda _, args, output, router=router: found.append((router, output)))
    with torch.no_grad():
        run(model, model_type)
    return found


def choice(router: Router, model_type: str) -> tuple[Tensor, Tensor]:
    index = (
        other_routes(model_type).experts[router.label].long()
        if model_type not in NOT_WRITTEN
        else torch.arange(24 * router.top_k).view(24, -1) % router.num_experts
    )
    return index, 0.25 + torch.rand(index.shape)


@pytest.mark.parametrize("model_type", sorted(FORMS.keys() - NOT_WRITTEN))
def test_another_choice_is_read_where_it_was_written(model_type):
    for router, output in outputs(model_type):
        index, weights = choice(router, model_type)
        before = [part.clone() if isinstance(part, Tensor) else part for part in output]
        written = write_output(output, router, index, weights)
        logits, found = read_output(written, router)
        # Weights of all experts have no order of the chosen.
        order, found_order = index.argsort(1), found.top_k_index.argsort(1)
        if router.skip_class is not None:
            weights = torch.where(index == router.skip_class, 0, weights)
        assert torch.equal(found.top_k_index.gather(1, found_order), index.gather(1, order))
        assert torch.equal(found.top_k_weights.gather(1, found_order), weights.gather(1, order))
        assert torch.equal(logits, read_output(output, router)[0])
        for old, kept, new in zip(before, output, written, strict=True):
            assert not isinstance(old, Tensor) or torch.equal(kept, old), "the output itself was changed"
            assert not isinstance(old, Tensor) or (new.dtype, new.shape) == (old.dtype, old.shape)


@pytest.mark.parametrize("model_type", sorted(NOT_WRITTEN))
def test_a_form_that_cannot_be_written_is_none(model_type):
    for router, output in outputs(model_type):
        assert write_output(output, router, *choice(router, model_type)) is None


def test_dtype_shape_and_kind_are_those_of_the_output():
    (router, (logits, weights, index)), *_ = outputs("qwen3_moe")
    output = [logits, index.int().view(2, 12, -1), weights.bfloat16().view(2, 12, -1), "else"]
    written = write_output(output, router, *choice(router, "qwen3_moe"))
    assert isinstance(written, list)
    assert [part.dtype for part in written[:3]] == [logits.dtype, torch.int32, torch.bfloat16]
    assert written[1].shape == written[2].shape == (2, 12, router.top_k)
    assert written[0] is logits
    assert written[3] == "else"


@pytest.mark.parametrize("by_keyword", [0, 1, 2, 3])
def test_a_call_keeps_its_arguments_in_their_places(by_keyword):
    (router, (_, weights, index)), *_ = outputs("qwen3_moe")
    values = {"hidden_states": torch.zeros(24, router.top_k), "index": index, "weights": weights}
    names = list(values)[3 - by_keyword :]
    args = tuple(values[name] for name in values if name not in names)
    kwargs = {name: values[name] for name in names}
    new_index, new_weights = choice(router, "qwen3_moe")
    found_args, found_kwargs = write_call(args, kwargs, router, new_index, new_weights)
    assert list(found_kwargs) == names
    tokens, *_ = found = [*found_args, *found_kwargs.values()]
    assert tokens is values["hidden_states"]
    read = read_call(found, 24, router)
    assert torch.equal(read.top_k_index, new_index)
    assert torch.equal(read.top_k_weights, new_weights)
    assert write_call(args[:1], {}, router, new_index, new_weights) is None if args else True
