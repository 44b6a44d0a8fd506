"""A yardstick of replay that shares nothing with it: the family's own code, with `torch.topk` told what to find.

It works for families that pick their experts with one call of `torch.topk` over the scores that the weights are made
of; with it bias and groups, scales and normalisation are those of the family.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.families import build, inputs
from trl_moe_ext.experts import census
from trl_moe_ext.router.record import RoutingRecord
from trl_moe_ext.router.recorder import RoutingRecorder
from trl_moe_ext.router.replay import RoutingReplay
from trl_moe_ext.router.routers import find_routers
from trl_moe_ext.router.trace import RouterTrace

# A way to replay a record: inside, the routers of a model choose its experts.
Way = Callable[[nn.Module, RoutingRecord], AbstractContextManager[None]]


def recorded(model: nn.Module, model_type: str) -> RoutingRecord:
    """The routes of the tokens of the family's inputs."""
    recorder = RoutingRecorder()
    with torch.no_grad(), RouterTrace(find_routers(model), recorder):
        run(model, model_type)
    return recorder.take()


@functools.cache
def other_routes(model_type: str) -> RoutingRecord:
    """Those of a model with other weights: almost all tokens go to other experts."""
    return recorded(build(model_type, seed=1), model_type)


def run(model: nn.Module, model_type: str) -> Tensor:
    torch.manual_seed(0)
    arguments = inputs(model_type)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    arguments = {n: x.to(dtype) if x.is_floating_point() else x for n, x in arguments.items()}
    return census.output(model, arguments)


def replayed(model: nn.Module, model_type: str, record: RoutingRecord) -> Tensor:
    """The output by the code under test."""
    with replaying(model, record):
        return run(model, model_type)


def forced(model: nn.Module, model_type: str, record: RoutingRecord) -> Tensor:
    """The output by the family's own code."""
    with forced_topk(model, record):
        return run(model, model_type)


@contextmanager
def replaying(model: nn.Module, record: RoutingRecord) -> Iterator[None]:
    with RoutingReplay(find_routers(model)) as replay:
        replay.record = record
        yield


@contextmanager
def forced_topk(model: nn.Module, record: RoutingRecord) -> Iterator[None]:
    with ExitStack() as stack:
        mode = stack.enter_context(_ForcedTopK())
        for router in find_routers(model):

            def start(*_: Any, router: Any = router) -> None:
                mode.index, mode.num_experts = record.experts[router.label].long(), router.num_experts

            stack.callback(router.module.register_forward_pre_hook(start).remove)
        yield


class _ForcedTopK(TorchFunctionMode):
    """Finds the experts of `index` wherever the largest of all scores are looked for."""

    index: Tensor
    num_experts = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk) or args[0].shape[-1] != self.num_experts:
            return found
        if found.indices.numel() != self.index.numel():  # of groups
            return found
        index = self.index.view_as(found.indices)
        return torch.return_types.topk((args[0].gather(-1, index), index))
