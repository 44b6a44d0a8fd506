"""A router that is trained: in float32, with a learning rate of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trl_moe_ext.router.precision import to_float32
from trl_moe_ext.router.routers import Router

__all__ = ["compute_in_float32", "router_parameters", "set_learning_rate"]

# On a module that computes in float32 already.
_IS_HOOKED = "_computes_in_float32"


def router_parameters(routers: Sequence[Router]) -> list[nn.Parameter]:
    """The parameters of routers, or of what an adapter adds to them, that are trained."""
    found = {id(p): p for router in routers for p in router.module.parameters() if p.requires_grad}
    return list(found.values())


def compute_in_float32(router: Router) -> None:
    """Keep the weights of a router in float32 and multiply in float32, also under autocast.

    Steps of a usual learning rate are lost to rounding in bfloat16, and near ties between experts are decided by it.
    The logits are float32; what else the router returns, and what the experts are called with, has the dtype of the
    tokens. Merging the adapter, or unloading it, gives the weights their own dtype back.
    """
    module = router.module
    if vars(module).get(_IS_HOOKED):
        return  # by an earlier trainer of the same model
    vars(module)[_IS_HOOKED] = True
    to_float32(module)
    scopes: list[tuple[Any, torch.dtype | None]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = next((value for value in (*args, *kwargs.values()) if _is_half(value)), None)
        scope: Any = torch.autocast(next(module.parameters()).device.type, enabled=False)
        scopes.append((scope, None if given is None else given.dtype))
        scope.__enter__()
        return tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        scope, dtype = scopes.pop()
        scope.__exit__(None, None, None)
        if dtype is None or not isinstance(output, tuple):
            return output
        # The weights of the chosen experts go on into the block, which expects them in its own dtype.
        is_logits = [_is_logits(part, position, router) for position, part in enumerate(output)]
        return tuple(part if keep else _as(part, dtype) for part, keep in zip(output, is_logits, strict=True))

    module.register_forward_pre_hook(before, with_kwargs=True)
    if router.experts_module is not None:
        # A router that returns logits alone leaves the weights to its block, which makes them of the logits' dtype.
        router.experts_module.register_forward_pre_hook(_weights_like_tokens, with_kwargs=True)
    # Also when the forward fails: autocast would stay off for all that follows.
    module.register_forward_hook(after, always_call=True)


def _weights_like_tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tokens = next(iter((*args, *kwargs.values())), None)
    if not isinstance(tokens, Tensor) or not _is_half(tokens):
        return None
    return tuple(_as(arg, tokens.dtype) for arg in args), {
        name: _as(arg, tokens.dtype) for name, arg in kwargs.items()
    }


def _is_logits(part: Any, position: int, router: Router) -> bool:
    if router.logits_at is not None:
        return position == router.logits_at
    return isinstance(part, Tensor) and part.shape[-1:] == (router.num_experts,)


def _as(part: Any, dtype: torch.dtype) -> Any:
    return part.to(dtype) if isinstance(part, Tensor) and part.dtype == torch.float32 else part


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _wide(value: Any) -> Any:
    return value.float() if _is_half(value) else value


def set_learning_rate(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], rate: float) -> None:
    """Move parameters of an optimizer to groups of their own, with this learning rate and all else as it was."""
    moved = {id(p) for p in parameters}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in moved]
        if mine:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
            optimizer.add_param_group({**group, "params": mine, "lr": rate})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
