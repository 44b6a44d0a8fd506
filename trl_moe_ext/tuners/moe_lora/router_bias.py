"""A bias of each expert for the choice of experts, kept with the adapter of the experts.

It is no part of the router, of which an adapter may train a copy: the adapted experts keep it, and a hook after their
router runs it again with the bias (`router.selection`).

Legend: E experts of the router.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from trl_moe_ext.router.places import running
from trl_moe_ext.router.selection import SelectionBias

if TYPE_CHECKING:
    from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts


class RouterBias(nn.Module):
    """The bias of one adapter for one layer, ``(E,)`` float32.

    A parameter, because TRL copies the parameters of an adapter, and nothing else, into the reference model of DPO,
    GRPO and KTO. It never requires a gradient: none reaches it.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(num_experts, dtype=torch.float32), requires_grad=False)


@dataclass(eq=False)
class RunWithBias:
    """After a router has run: run it once more with the bias of its experts, if an adapter that acts now has one.

    A hook for the forward of the family's own router, and of every copy of it.
    """

    experts: MoeLoraExperts
    way: SelectionBias

    def __call__(self, router: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        was_merged = self.experts.merged
        bias = total_bias(self.experts)
        if bias is not None:
            return self.way.run(router, bias, args, kwargs)
        # Experts that are disabled give a merged adapter back when they are asked: the router ran with its bias.
        is_given_back = was_merged and not self.experts.merged
        return router.forward(*args, **kwargs) if is_given_back else output

    def __deepcopy__(self, memo: dict[int, Any]) -> RunWithBias:
        # PEFT copies a router to train the copy, which is for the same experts. In a copy of the whole model, the
        # experts are copied as well, and `BiasedRouter` sees to it.
        return RunWithBias(self.experts, self.way)


@dataclass(eq=False)
class BiasedRouter:
    """A router that runs with the bias of adapted experts.

    Attributes:
        experts: whose bias it is.
        name: for messages.
        called: what the block calls in the router's place.
        block: the module that calls it.
        way: how the bias is brought in.
        merged: the family's own bias and its values before each merge, the last at the end.
    """

    experts: MoeLoraExperts
    name: str
    called: nn.Module
    block: nn.Module
    way: SelectionBias
    merged: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def stored(self) -> Tensor | None:
        """The bias that the family has itself, if it has one."""
        return self.way.stored(running(self.called), self.block)

    def hook(self) -> None:
        """Make the router, and every copy of it, run with the bias."""
        for module in _own_routers(self.called):
            remove_hooks(module)
            # First of all hooks: what watches the router sees what the block will get.
            module.register_forward_hook(RunWithBias(self.experts, self.way), prepend=True, with_kwargs=True)

    def __deepcopy__(self, memo: dict[int, Any]) -> BiasedRouter:
        called, block, merged = copy.deepcopy((self.called, self.block, self.merged), memo)
        twin = BiasedRouter(memo.get(id(self.experts), self.experts), self.name, called, block, self.way, merged)
        twin.hook()
        return twin


def total_bias(experts: MoeLoraExperts) -> Tensor | None:
    """The sum of the biases of the adapters that act now, ``(E,)`` float32, or None if none of them has one."""
    biases = [bias for name in experts.adapters_to_apply() if (bias := bias_of(experts, name)) is not None]
    return torch.stack([bias.float() for bias in biases]).sum(0) if biases else None


def bias_of(experts: MoeLoraExperts, adapter_name: str) -> Tensor | None:
    """The bias of one adapter, the parameter itself, or None if it has none."""
    kept: Any = dict(experts.lora_router_bias.items()).get(adapter_name)
    return None if kept is None else kept.bias


def remove_hooks(model: nn.Module) -> None:
    """Make the routers in `model` run without biases again."""
    for module in model.modules():
        hooks = module._forward_hooks
        for number in [number for number, hook in hooks.items() if isinstance(hook, RunWithBias)]:
            del hooks[number], module._forward_hooks_with_kwargs[number]


def _own_routers(called: nn.Module) -> Iterator[nn.Module]:
    """The family's own router and every copy of it that an adapter trains, inside the wrappers of PEFT."""
    if isinstance(called, ModulesToSaveWrapper):
        for module in (called.original_module, *called.modules_to_save.values()):
            yield from _own_routers(module)
    elif isinstance(called, BaseTunerLayer):
        yield from _own_routers(called.get_base_layer())
    else:
        yield called
