"""Find the routers that an adapter's `router_bias` is for, prepare them, and look their biases up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trl_moe_ext.errors import ConfigError
from trl_moe_ext.router.places import Place, read_places
from trl_moe_ext.router.routers import Router, find_routers
from trl_moe_ext.router.selection import SelectionBias
from trl_moe_ext.router.selection_probe import find_selection_bias
from trl_moe_ext.tuners.moe_lora.layer import MoeLoraExperts
from trl_moe_ext.tuners.moe_lora.router_bias import BiasedRouter, bias_of
from trl_moe_ext.tuners.targets.resolve import Targets

__all__ = ["bias_sizes", "hook_biased_routers", "router_biases"]


def router_biases(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Label of a router (`Router.label`) -> the bias of its experts in an adapter: the parameters themselves.

    Args:
        model: with the adapter.
        adapter_name: of an adapter with ``router_bias=True``; without it there are none.

    Returns:
        ``(E,)`` in float32, to be changed in place, wherever the model is moved to. Routers of experts that share
        their weights share one.
    """
    found: dict[str, Tensor] = {}
    for router in find_routers(model):
        experts = router.experts_module
        bias = bias_of(experts, adapter_name) if isinstance(experts, MoeLoraExperts) else None
        if bias is not None:
            found[router.label] = bias
    return found


def bias_sizes(targets: Targets, model: nn.Module) -> dict[str, int]:
    """Modules of experts that get a bias -> how many numbers it has; checked to work for each of their routers.

    Args:
        targets: what the adapter takes from the model.
        model: with or without other adapters.

    Raises:
        ConfigError: no router leads to adapted experts, or one of them does not take a bias.
        LayoutError: the model has experts whose router cannot be told.
    """
    routers = [router for router in find_routers(model) if router.experts in targets.experts]
    if not routers:
        raise ConfigError(
            "router_bias has no effect: no router chooses among experts that are adapted as stacks. Leave it out, or "
            "balance by a loss (router_aux_loss_coef)"
        )
    places, known = read_places(model), _Known()
    for router in routers:
        known.way(router, _block(router, places))
    return {router.experts: router.num_experts for router in routers}


def hook_biased_routers(model: nn.Module) -> None:
    """Make routers run with the biases of their experts; to be called whenever an adapter was added.

    Args:
        model: with adapters, of which some have biases.
    """
    layers = [m for m in model.modules() if isinstance(m, MoeLoraExperts) and len(m.lora_router_bias)]
    if not layers:
        return
    merged = {router.name: router.merged for layer in layers for router in layer.biased_routers}
    for layer in layers:
        layer.biased_routers.clear()
    places, known = read_places(model), _Known()
    for router in find_routers(model):
        experts = router.experts_module
        if isinstance(experts, MoeLoraExperts) and len(experts.lora_router_bias):
            block = _block(router, places)
            way = known.way(router, block)
            biased = BiasedRouter(experts, router.name, router.module, block, way, merged.get(router.name, []))
            biased.hook()
            experts.biased_routers.append(biased)


class _Known:
    """The ways of routers, each kind of which is tried once."""

    def __init__(self) -> None:
        self._ways: dict[Any, SelectionBias] = {}

    def way(self, router: Router, block: nn.Module) -> SelectionBias:
        own = router.own
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in own.state_dict().items())
        options = tuple((n, v) for n, v in vars(own).items() if isinstance(v, (bool, int, float, str, type(None))))
        kind = (type(own), type(block), router.top_k, router.num_experts, shapes, options)
        if kind not in self._ways:
            self._ways[kind] = find_selection_bias(router, block)
        return self._ways[kind]


def _block(router: Router, places: Mapping[str, Place]) -> nn.Module:
    return places[router.name.rpartition(".")[0]].module
