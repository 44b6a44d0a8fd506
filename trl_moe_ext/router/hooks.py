"""Hooks on the routers of a model, and on the experts that are called with what they chose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from trl_moe_ext.router.routers import Router

__all__ = ["RouterHooks", "in_backward"]


class RouterHooks(ABC):
    """A context in which something happens at every forward of every router.

    Args:
        routers: of one model, found after its adapters were attached.
    """

    def __init__(self, routers: Sequence[Router]) -> None:
        self._routers = tuple(routers)
        self._handles: list[RemovableHandle] = []

    def attach(self) -> Self:
        """Begin; nothing happens if the hooks are attached already."""
        if not self._handles:
            for router in self._routers:
                self._handles.append(router.module.register_forward_hook(partial(self._after_router, router)))
                if router.experts_module is not None:
                    hook = partial(self._before_experts, router)
                    self._handles.append(router.experts_module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def remove(self) -> None:
        """End; nothing happens if the hooks are not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @abstractmethod
    def _after_router(self, router: Router, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Called with what a router returns; what it returns, unless None, takes its place."""

    @abstractmethod
    def _before_experts(
        self, router: Router, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Called with the arguments of a router's experts; a pair of new ones, unless None, takes their place."""


def in_backward() -> bool:
    """Whether this forward is the recomputation of a checkpoint: only inside a backward pass there is a task id."""
    return torch._C._current_graph_task_id() != -1
